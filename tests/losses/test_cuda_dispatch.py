"""The losses of a micro-batch on CUDA's tensors: types of gradients, and where the host waits."""

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from megatron_mlr1.losses.distillation import (
    HiddenTargets,
    Lesson,
    distillation_loss,
    divergence_loss,
)
from megatron_mlr1.losses.language_model import linear_language_model_loss, summed_by
from megatron_mlr1.losses.vocab_parallel import Foreseen, TensorParallel
from megatron_mlr1.ops.head_chunks import Chunks
from megatron_mlr1.ops.linear_kl import Head, Objective
from megatron_mlr1.ops.sparse_targets import SparseForm, SparseTargets
from tests.support.fake_cuda import backward, fake_cuda

BF16, FP32 = torch.bfloat16, torch.float32
SHAPE, WIDTH, IDS = (16, 2), 24, 304
TOKENS = SHAPE[0] * SHAPE[1]
PARALLEL = TensorParallel(group=None, num_ids=300)


@pytest.fixture
def witness():
    with fake_cuda() as witness:
        yield witness


def on_device(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def student():
    hidden = on_device(*SHAPE, WIDTH, dtype=BF16).requires_grad_()
    weight = torch.nn.Parameter(on_device(IDS, WIDTH, dtype=BF16))
    return Head(hidden=hidden, weight=weight)


def labels():
    # [B, S] turned round, as the engine's batches come to the head.
    return on_device(*SHAPE[::-1], dtype=torch.int64).t(), on_device(*SHAPE[::-1]).t()


def teacher_weight():
    return on_device(IDS, 2 * WIDTH, dtype=BF16)


def lesson(name):
    states = (*SHAPE, 2 * WIDTH)
    if name == "hidden":
        targets = HiddenTargets(hidden=on_device(*states, dtype=BF16))
    elif name == "int8":
        hidden = on_device(*states, dtype=torch.int8)
        targets = HiddenTargets(hidden=hidden, scale=on_device(*SHAPE))
    else:
        targets = SparseTargets(
            form=SparseForm(top=3, points=2),
            ids=on_device(TOKENS, 5, dtype=torch.int64),
            weights=on_device(TOKENS, 5),
            tail=on_device(TOKENS),
            entropy=on_device(TOKENS),
        )
    return Lesson(targets=targets, alpha=0.7)


def language_model(head, **words):
    return linear_language_model_loss(
        head.hidden, head.weight, *labels(), parallel=PARALLEL, z_loss=1e-4, **words
    )


def distillation(name):
    def run(head, **words):
        given = None if name == "sparse" else teacher_weight()
        words = {"teacher_weight": given, "parallel": PARALLEL} | words
        return distillation_loss(head, lesson(name), *labels(), **words)

    return run


LOSSES = {"language model": language_model} | {
    name: distillation(name) for name in ("hidden", "int8", "sparse")
}
SOME = {
    "all tokens": lambda: Chunks(),
    "some": lambda: Chunks(rows=on_device(9, dtype=torch.int64)),
}


def learn(done):
    # As the schedules do, in place.
    total = done.total
    total /= done.tokens.clamp(min=1)
    backward(total / 2)


@pytest.mark.parametrize("chunks", SOME)
@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward_of_tokens_that_are_known_wait_for_nobody(witness, name, chunks):
    head = student()
    done = LOSSES[name](head, chunks=SOME[chunks]())
    learn(done)
    for given in (head.hidden, head.weight):
        assert given.grad is not None
        assert (given.grad.dtype, given.grad.shape) == (BF16, given.shape)
        assert given.grad.device == given.device
    assert all(row.is_cuda and row.dtype == FP32 for row in done.report.values())
    assert (done.tokens.dtype, done.tokens.device) == (torch.int32, head.weight.device)
    assert witness.waits == []


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_that_is_foreseen_goes_into_the_main_gradient_in_fp32(witness, name):
    head = student()
    main_grad = on_device(IDS, WIDTH)
    arrived = []
    deliver = Foreseen(factor=on_device(), into=main_grad, arrived=arrived.append)
    done = LOSSES[name](head, chunks=Chunks(size=16), deliver=deliver)
    assert witness.operators["aten.addmm.dtype_out"] == TOKENS // 16
    learn(done)
    assert len(arrived) == 1
    assert arrived[0] is head.weight
    assert head.hidden.grad.dtype == BF16
    assert witness.operators["aten._assert_async.msg"] == 1
    assert witness.waits == []


@pytest.mark.parametrize("name", LOSSES)
def test_leaving_masked_tokens_out_asks_the_device_how_many_there_are(witness, name):
    with pytest.raises(DynamicOutputShapeException, match="nonzero"):
        LOSSES[name](student())


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_the_definition_of_a_divergence_waits_for_nobody(witness, direction):
    head = student()
    alone = language_model(head, chunks=Chunks())
    taught = Lesson(
        targets=lesson("hidden").targets, alpha=0.7, objective=Objective(direction=direction)
    )
    done = divergence_loss(
        alone,
        head,
        taught,
        labels()[1],
        teacher_weight=teacher_weight(),
        num_ids=300,
        kernel="reference",
    )
    learn(done)
    assert head.weight.grad.dtype == head.hidden.grad.dtype == BF16
    assert witness.waits == []


def test_another_librarys_sum_is_counted_without_a_wait(witness):
    head = student()
    summed_by(lambda h, w, y: (h @ w.t()).float().sum(), head.hidden, head.weight, *labels())
    assert witness.waits == []
