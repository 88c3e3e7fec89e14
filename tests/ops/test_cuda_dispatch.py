"""What the ops do with CUDA's tensors: which operators, which types, and that nobody waits."""

import pytest
import torch

from megatron_mlr1.ops import cross_entropy_rows as ce
from megatron_mlr1.ops import kl_rows as kl
from megatron_mlr1.ops import qk_norm_rope as rope
from megatron_mlr1.ops import sparse_kl_rows as sparse
from megatron_mlr1.ops import swiglu
from megatron_mlr1.ops import swiglu_fp8 as fp8
from megatron_mlr1.ops.head_chunks import Chunks, Shard, Wanted
from megatron_mlr1.ops.linear_cross_entropy import linear_cross_entropy
from megatron_mlr1.ops.linear_kl import Head, Objective, TokenWeights, linear_kl
from megatron_mlr1.ops.linear_sparse_kl import linear_sparse_kl
from megatron_mlr1.ops.sparse_targets import SparseForm, SparseTargets
from tests.support.fake_cuda import fake_cuda

BF16, FP32 = torch.bfloat16, torch.float32
TOKENS, WIDTH, IDS, PADDED = 37, 24, 300, 304


@pytest.fixture
def witness():
    with fake_cuda() as witness:
        yield witness


def on_device(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def ids(*shape):
    return on_device(*shape, dtype=torch.int64)


def layout(found):
    """What is known of outputs without their numbers."""
    tensors = found if isinstance(found, tuple) else (found,)
    return [None if t is None else (t.device, t.dtype, t.shape, t.stride()) for t in tensors]


def swiglu_rows(dtype):
    x, grad = on_device(5, 2, 2 * WIDTH, dtype=dtype), on_device(5, 2, WIDTH, dtype=dtype)
    yield swiglu._swiglu, swiglu.swiglu_reference, (x,)
    yield swiglu._swiglu_backward, swiglu.swiglu_backward_reference, (grad, x)
    for transpose in (False, True):
        words = (x, on_device(1), on_device(1), transpose)
        yield fp8._swiglu_fp8, fp8.swiglu_fp8_reference, words


def rotation_rows(dtype, bounds):
    shape = (TOKENS,) if bounds else (TOKENS, 2)
    bounds = on_device(4, dtype=torch.int32) if bounds else None
    qkv, angles = on_device(*shape, 10 * 8, dtype=dtype), on_device(TOKENS, 4)
    yield rope._qk_norm_rope, rope.qk_norm_rope_reference, (qkv, angles, bounds, 2, 1e-5)
    q, k = on_device(*shape, 6, 8, dtype=dtype), on_device(*shape, 2, 8, dtype=dtype)
    # As attention gives them: heads before tokens.
    grad_q = on_device(6, *shape, 8, dtype=dtype).movedim(0, -2)
    words = (grad_q, k.clone(), k.clone(), q, k, on_device(*shape, 8), angles, bounds)
    yield rope._qk_norm_rope_backward, rope.qk_norm_rope_backward_reference, words


def cross_entropy_rows(logits, narrow):
    label, row = ids(TOKENS), on_device(TOKENS)
    yield ce.cross_entropy_partials, ce.cross_entropy_partials_reference, (logits, label)
    words = (logits, label, row, row, row, narrow)
    yield ce.cross_entropy_gradient_, ce.cross_entropy_gradient_reference, words
    yield ce.cross_entropy_, ce.cross_entropy_reference, (logits, label, row, 1e-4, narrow)


def kl_rows(logits, narrow):
    label, teacher = ids(TOKENS), torch.empty_like(logits)
    for temperature, direction in ((1.0, "forward"), (2.0, "reverse"), (2.0, "jsd")):
        words = (logits, teacher, label, temperature, direction == "reverse")
        yield kl.kl_partials, kl.kl_partials_reference, words
        rows, weights = on_device(4, TOKENS), on_device(3, TOKENS)
        goal = (temperature, direction, 0.5)
        words = (logits, teacher, label, rows, weights, *goal, narrow)
        yield kl.kl_gradient_, kl.kl_gradient_reference, words
        words = (logits, teacher, label, on_device(2, TOKENS), *goal, 1e-4, narrow)
        yield kl.kl_, kl.kl_reference, words
    row = on_device(TOKENS)
    words = (logits, teacher, row, row, 2.0, 0.3)
    yield kl.jsd_partials, kl.jsd_partials_reference, words


def sparse_rows(logits, narrow):
    label, columns, given = ids(TOKENS), ids(TOKENS, 5), on_device(TOKENS, 5)
    for bucket in (False, True):
        words = (logits, label, columns, given, 2.0, bucket)
        yield sparse.sparse_kl_partials, sparse.sparse_kl_partials_reference, words
        stacked = (on_device(3, TOKENS), on_device(3, TOKENS))
        words = (logits, label, columns, given, *stacked, 2.0, bucket, narrow)
        yield sparse.sparse_kl_gradient_, sparse.sparse_kl_gradient_reference, words


ROWS = {
    "swiglu bf16": lambda: swiglu_rows(BF16),
    "swiglu fp32": lambda: swiglu_rows(FP32),
    "rotation": lambda: rotation_rows(BF16, bounds=False),
    "rotation of packed documents": lambda: rotation_rows(BF16, bounds=True),
    **{
        f"{rows.__name__} {name}": lambda rows=rows, dtype=dtype: rows(
            on_device(TOKENS, IDS, dtype=dtype), BF16
        )
        for rows in (cross_entropy_rows, kl_rows, sparse_rows)
        for name, dtype in (("fp32", FP32), ("bf16", BF16))
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_a_definition_serves_the_device_without_a_wait_and_gives_what_its_op_says(witness, name):
    for op, definition, words in ROWS[name]():
        assert layout(op(*words)) == layout(definition(*words)), definition.__name__
    assert witness.waits == []


def head(dtype, **changes):
    return Head(hidden=on_device(TOKENS, WIDTH, dtype=dtype), weight=weight(dtype), **changes)


def weight(dtype):
    return on_device(PADDED, WIDTH, dtype=dtype)


def cross_entropy(dtype, **words):
    student = head(dtype)
    return linear_cross_entropy(
        student.hidden, student.weight, ids(TOKENS), on_device(TOKENS), z_loss=1e-4, **words
    )


def divergence(dtype, teacher=None, **objective):
    def run(**words):
        weights = TokenWeights(cross_entropy=on_device(TOKENS), divergence=on_device(TOKENS))
        given = teacher() if teacher else head(dtype)
        goal = Objective(z_loss=1e-4, **objective)
        return linear_kl(head(dtype), given, ids(TOKENS), weights, objective=goal, **words)

    return run


def int8_head():
    hidden = on_device(TOKENS, 2 * WIDTH, dtype=torch.int8)
    given = on_device(PADDED, 2 * WIDTH, dtype=BF16)
    return Head(hidden=hidden, weight=given, scale=on_device(TOKENS))


def sparse_divergence(dtype, points):
    def run(**words):
        targets = SparseTargets(
            form=SparseForm(top=3, points=points, temperature=2.0),
            ids=ids(TOKENS, 3 + points),
            weights=on_device(TOKENS, 3 + points),
            tail=on_device(TOKENS),
            entropy=on_device(TOKENS),
        )
        weights = TokenWeights(cross_entropy=on_device(TOKENS), divergence=on_device(TOKENS))
        return linear_sparse_kl(head(dtype), targets, ids(TOKENS), weights, z_loss=1e-4, **words)

    return run


LOSSES = {
    "cross-entropy": lambda **words: cross_entropy(BF16, **words),
    "forward": divergence(BF16),
    "reverse": divergence(BF16, direction="reverse", temperature=2.0),
    "jsd": divergence(BF16, direction="jsd", beta=0.3),
    "of int8": divergence(BF16, int8_head),
    "top k": sparse_divergence(BF16, 0),
    "hybrid": sparse_divergence(BF16, 4),
}
CHUNK, COUNTED = 16, 29
NUM_CHUNKS = 2


def chunks(logits=None):
    return Chunks(rows=ids(COUNTED), size=CHUNK, logits=logits)


@pytest.mark.parametrize("logits", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_gives_narrow_gradients_to_hidden_states_and_wide_ones_to_the_head(
    witness, name, logits
):
    shard = Shard(first_id=0, num_ids=IDS)
    done = LOSSES[name](shard=shard, chunks=chunks(logits))
    assert layout(done.total) == layout(on_device())
    assert layout(done.gradients.hidden) == layout(on_device(TOKENS, WIDTH, dtype=BF16))
    assert layout(done.gradients.weight) == layout(weight(FP32))
    assert witness.waits == []


@pytest.mark.parametrize("logits", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LOSSES)
def test_products_are_of_narrow_matrices_and_the_heads_gradient_is_added_in_place(
    witness, name, logits
):
    wanted = Wanted(factor=on_device(), into=weight(FP32))
    done = LOSSES[name](chunks=chunks(logits), wanted=wanted)
    assert done.gradients.weight is wanted.into
    products = {key: n for key, n in witness.operators.items() if "mm" in key}
    teachers = name in ("forward", "reverse", "jsd", "of int8")
    forward = "aten.mm.out" if logits == BF16 else "aten.mm.dtype_out"
    assert products == {
        forward: NUM_CHUNKS * (1 + teachers),
        "aten.mm.default": NUM_CHUNKS,
        "aten.addmm.dtype_out": NUM_CHUNKS,
    }
    assert witness.waits == []


@pytest.mark.parametrize("name", LOSSES)
def test_a_split_vocabulary_sums_the_gradient_of_hidden_states_in_fp32(witness, name):
    across = []
    shard = Shard(first_id=0, num_ids=IDS, max_across=across.append, sum_across=across.append)
    done = LOSSES[name](shard=shard, chunks=chunks())
    assert layout(done.gradients.hidden) == layout(on_device(TOKENS, WIDTH))
    assert across
    assert all(tensor.is_cuda for tensor in across)
    assert witness.waits == []


@pytest.mark.parametrize("logits", [None, BF16], ids=["fp32", "bf16"])
def test_a_model_in_fp32_multiplies_in_fp32(witness, logits):
    done = cross_entropy(FP32, chunks=chunks(logits))
    assert layout(done.gradients.hidden) == layout(on_device(TOKENS, WIDTH))
    assert layout(done.gradients.weight) == layout(weight(FP32))
    assert not any("dtype" in key for key in witness.operators)
    assert witness.waits == []


def test_a_witness_sees_a_wait(witness):
    """So that what finds none here could have found one."""
    x = on_device(3)
    x.cpu()
    x + torch.zeros(3).to(x.device)
    x[x > 0] = on_device()
    x.copy_(torch.zeros(3))
    assert len(witness.waits) == 4
    x.copy_(torch.zeros(3), non_blocking=True)
    x[x > 0] = 0
    assert len(witness.waits) == 4
