"""Models that are split over GPUs, on CUDA's tensors without a GPU; other ranks are not there."""

from contextlib import contextmanager

import pytest
import torch

from megatron_mlr1 import cpu

cpu.activate()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from megatron_mlr1.losses.distillation import HiddenTargets, Lesson  # noqa: E402
from megatron_mlr1.model.attention import CausalAttention  # noqa: E402
from megatron_mlr1.model.build import transformer_config  # noqa: E402
from megatron_mlr1.model.head_kernels import HeadKernels  # noqa: E402
from megatron_mlr1.model.loss_head import LossHead, Teacher  # noqa: E402
from tests.support.fake_cuda import backward, fake_cuda  # noqa: E402
from tests.support.fake_cuda_model import SHAPE, model_on_device  # noqa: E402

BATCH, LENGTH, WIDTH = 2, 16, 24


@contextmanager
def first_of_two(**layout):
    """Groups of two ranks of which there is one: what it sends goes nowhere."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        parallel_state.initialize_model_parallel(**layout, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def on_device(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("learns_from", ["text", "a teacher"])
@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "tensor and sequence"])
def test_half_a_head_and_half_the_layers_learn_without_a_wait(sequence, learns_from):
    with first_of_two(tensor_model_parallel_size=2) as groups, fake_cuda() as witness:
        model = model_on_device(groups, sequence_parallel=sequence)
        lesson = teacher = None
        if learns_from == "a teacher":
            part = LENGTH // 2 if sequence else LENGTH
            lesson = Lesson(targets=HiddenTargets(hidden=on_device(part, BATCH, WIDTH)), alpha=0.7)
            teacher = Teacher(num_ids=120, weight=on_device(SHAPE.vocab_size // 2, WIDTH))
        head = LossHead(
            model.config,
            vocab_size=SHAPE.vocab_size - 4,
            kernels=HeadKernels(),
            teacher=teacher,
            num_micro_batches=lambda: 2,
        )
        ids = on_device(BATCH, LENGTH, dtype=torch.int64)
        done = model(
            ids,
            torch.arange(LENGTH, device="cuda").expand(BATCH, LENGTH),
            None,
            labels=ids,
            loss_mask=on_device(BATCH, LENGTH, dtype=torch.float32),
            output_processor=head,
            output_processor_context=lesson,
        )
        backward(done.total / done.tokens.clamp(min=1) / 2)
        assert model.shared_embedding_or_output_weight().shape == (64, SHAPE.hidden_size)
        for name, parameter in model.named_parameters():
            assert parameter.grad.dtype == torch.bfloat16, name
        assert witness.operators["aten.addmm.dtype_out"] == 1
        assert ("c10d._reduce_scatter_base_.default" in witness.operators) == sequence
        assert witness.waits == []


class Attentions(TorchFunctionMode):
    """Sees what torch's attention is given: how many heads of keys, and whether for groups."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.asked.append((args[1].size(1), kwargs["enable_gqa"]))
        return func(*args, **(kwargs or {}))


def attend(groups, dtype):
    """Six query heads of two groups, forward and backward; what torch was asked."""
    attention = CausalAttention(
        config=transformer_config(SHAPE, norm_epsilon=1e-5),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=groups,
    )
    inputs = [
        on_device(LENGTH, BATCH, heads, 16, dtype=dtype).requires_grad_() for heads in (6, 2, 2)
    ]
    with Attentions() as attentions:
        out = attention(*inputs, None, attn_mask_type=AttnMaskType.causal)
    assert (out.shape, out.dtype) == ((LENGTH, BATCH, 6 * 16), dtype)
    backward(out.sum())
    assert all(given.grad.shape == given.shape for given in inputs)
    return attentions.asked


@pytest.mark.parametrize(
    ("dtype", "asked"), [(torch.bfloat16, [(2, True)]), (torch.float32, [(6, False)])], ids=str
)
def test_groups_of_queries_stay_together_for_flash_attention_alone(dtype, asked):
    with first_of_two() as groups, fake_cuda() as witness:
        assert attend(groups, dtype) == asked
        assert witness.waits == []


def test_context_parallel_attention_gathers_keys_and_sums_their_gradients_without_a_wait():
    with first_of_two(context_parallel_size=2) as groups, fake_cuda() as witness:
        # The first rank has the first and the last quarter of a sequence; the mask of the last
        # keeps flash attention away, and with it the groups.
        assert attend(groups, torch.bfloat16) == [(2, True), (6, False)]
        assert witness.operators["c10d._allgather_base_.default"] == 2
        assert witness.operators["c10d._reduce_scatter_base_.default"] == 2
        assert witness.waits == []
