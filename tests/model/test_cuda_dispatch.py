"""A whole model, forward and backward, on CUDA's tensors without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from megatron_mlr1 import cpu

cpu.activate()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402

from megatron_mlr1.losses.distillation import HiddenTargets, Lesson  # noqa: E402
from megatron_mlr1.model.head_kernels import HeadKernels  # noqa: E402
from megatron_mlr1.model.loss_head import LossHead, Teacher  # noqa: E402
from megatron_mlr1.model.one_process import one_process  # noqa: E402
from tests.support.fake_cuda import backward, fake_cuda  # noqa: E402
from tests.support.fake_cuda_model import SHAPE, model_on_device  # noqa: E402

BATCH, LENGTH = 2, 16
MICRO_BATCHES = 2


@pytest.fixture(scope="module")
def groups():
    with one_process() as groups:
        yield groups


@pytest.fixture
def witness():
    with fake_cuda() as witness:
        yield witness


def documents():
    """Three documents in one sequence."""
    bounds = torch.zeros(4, dtype=torch.int32, device="cuda")
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=9,
        max_seqlen_kv=9,
    )


def loss(model, *, packed=False, kernels=None, foresees=True, lesson=None):
    shape = (1, BATCH * LENGTH) if packed else (BATCH, LENGTH)
    ids = torch.zeros(shape, dtype=torch.int64, device="cuda")
    head = LossHead(
        model.config,
        vocab_size=SHAPE.vocab_size - 4,
        kernels=kernels or HeadKernels(),
        teacher=lesson and Teacher(num_ids=120, weight=on_device(128, 24)),
        num_micro_batches=(lambda: MICRO_BATCHES) if foresees else None,
    )
    positions = torch.arange(shape[1], device="cuda").expand(shape)
    return model(
        ids,
        positions,
        None,
        labels=ids,
        loss_mask=torch.ones(shape, device="cuda"),
        packed_seq_params=documents() if packed else None,
        output_processor=head,
        output_processor_context=lesson,
    )


def learn(model, **words):
    done = loss(model, **words)
    backward(done.total / done.tokens.clamp(min=1) / MICRO_BATCHES)
    return done


def on_device(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("foresees", [True, False], ids=["foreseen", "in the backward"])
@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "documents"])
def test_a_step_of_a_whole_graph_never_waits_and_every_parameter_learns(
    groups, witness, packed, foresees
):
    model = model_on_device(groups)
    done = learn(model, packed=packed, foresees=foresees)
    assert (done.total.dtype, done.total.device.type) == (torch.float32, "cuda")
    assert all(row.dtype == torch.float32 and row.is_cuda for row in done.report.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.dtype, parameter.grad.is_cuda) == (torch.bfloat16, True), name
    assert model.shared_embedding_or_output_weight().grad_added_to_main_grad
    assert witness.waits == []


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "documents"])
def test_layers_run_the_fused_ops_once_each_way(groups, witness, packed):
    learn(model_on_device(groups), packed=packed)
    ran = {name: n for name, n in witness.operators.items() if not name.startswith("aten.")}
    assert ran == {
        "mlr1.qk_norm_rope.default": 2,
        "mlr1.qk_norm_rope_backward.default": 2,
        "mlr1.swiglu.default": 2,
        "mlr1.swiglu_backward.default": 2,
        "mlr1.cross_entropy_.default": 1,
        # Packed documents go through flash attention at once.
        **({"torch_attn._varlen_attn.default": 2} if packed else {}),
        **({"torch_attn._varlen_attn_backward.default": 2} if packed else {}),
    }


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_teachers_hidden_states_are_followed_without_a_wait(groups, witness, alpha):
    model = model_on_device(groups)
    targets = HiddenTargets(hidden=on_device(LENGTH, BATCH, 24))
    done = learn(model, lesson=Lesson(targets=targets, alpha=alpha))
    assert {"lm loss", "kd loss", "top-1 agreement"} <= done.report.keys()
    assert witness.waits == []


def test_narrow_logits_are_made_by_a_narrow_product(groups, witness):
    learn(model_on_device(groups), kernels=HeadKernels(logits="bf16"))
    assert witness.operators["aten.mm.out"] == 1
    assert "aten.mm.dtype_out" not in witness.operators
    assert witness.waits == []


def test_the_definition_of_a_divergence_gives_its_gradient_without_a_wait(groups, witness):
    lesson = Lesson(targets=HiddenTargets(hidden=on_device(LENGTH, BATCH, 24)), alpha=0.7)
    learn(model_on_device(groups), kernels=HeadKernels(divergence="reference"), lesson=lesson)
    assert witness.waits == []


def test_without_a_graph_the_head_asks_how_many_tokens_are_masked(groups, witness):
    with pytest.raises(DynamicOutputShapeException, match="nonzero"):
        loss(model_on_device(groups, whole_graph=False))


def test_packed_documents_in_fp32_are_cut_on_the_host(groups, witness):
    with pytest.raises(DataDependentOutputException):
        loss(model_on_device(groups, dtype=torch.float32), packed=True)
