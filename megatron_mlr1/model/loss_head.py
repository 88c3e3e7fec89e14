"""Output layer and loss of a `GPTModel` in one: the engine's own place for such a thing.

`GPTModel.forward` takes an `output_processor`, which runs in place of output layer and loss once
the last stage has its hidden states, and an `output_processor_context` that it hands on. A
`LossHead` is that processor. So no class of the engine is derived or replaced, checkpoints and
names stay, and whoever gives no processor (inference, conversion) gets logits by the normal path.
The context is the teacher's part in the micro-batch, or None.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.fp8_utils import is_mxfp8_output_proj_active
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.losses.distillation import Lesson, distillation_loss, divergence_loss
from megatron_mlr1.losses.language_model import (
    MicroBatchLoss,
    counted_rows,
    linear_language_model_loss,
    masked_sum,
    summed_by,
)
from megatron_mlr1.losses.vocab_parallel import Deliver, Foreseen, TensorParallel, add_to_grad
from megatron_mlr1.model.head_kernels import OF_ENGINE, HeadKernels
from megatron_mlr1.ops import libraries
from megatron_mlr1.ops.head_chunks import Chunks
from megatron_mlr1.ops.linear_kl import Head
from megatron_mlr1.ops.wide_matmul import wide_dtype

LIBRARY_LOSSES = {
    "liger": libraries.liger_cross_entropy,
    "quack": libraries.quack_cross_entropy,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """What the head needs of a teacher."""

    num_ids: int
    """Ids that student and teacher both have: no other has a probability in a distilled run."""

    weight: Tensor | None
    """This process's rows of the teacher's head, for hidden states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """What `GPTModel` hands over, sequence first as the hidden states are."""

    hidden: Tensor
    labels: Tensor
    mask: Tensor
    output_layer: ColumnParallelLinear
    output_weight: Tensor | None
    model_loss: Callable[[Tensor, Tensor], Tensor]

    @property
    def weight(self) -> Tensor:
        """The rows of the head that this process has."""
        found: Tensor | None = self.output_weight
        if found is None:
            found = self.output_layer.weight
        assert found is not None, "an output layer without a weight is given one"
        return found

    def parallel(self, num_ids: int) -> TensorParallel:
        """Say how the head is split."""
        return TensorParallel(
            group=self.output_layer.tp_group,
            num_ids=num_ids,
            sequence=self.output_layer.sequence_parallel,
        )

    def logits(self) -> Tensor:
        """Have the engine make all logits, [S, B, V / TP]."""
        logits, _bias = self.output_layer(self.hidden, weight=self.output_weight)
        made: Tensor = logits
        return made


class LossHead:
    """What a training or evaluation step gives to the model as its `output_processor`."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        kernels: HeadKernels,
        teacher: Teacher | None = None,
        num_micro_batches: Callable[[], int] | None = None,
    ) -> None:
        """Take what does not change between micro-batches.

        Args:
            config: of the model.
            vocab_size: ids that exist. "mlr1" gives no probability to the rows with which the
                engine pads its table, "reference" and "te" give them what their logits say.
            kernels: implementations.
            teacher: of the run, if any.
            num_micro_batches: how many the step has. Where it is given the factor of the backward
                follows from the schedule before the forward, see `factor_of_backward`; None adds
                the head's gradient to the main gradient in the backward.

        Raises:
            ConfigError: the model's head does something that the kernel has no formula for.
        """
        self._config, self._vocab_size, self._kernels = config, vocab_size, kernels
        self._teacher, self._num_micro_batches = teacher, num_micro_batches
        # A graph that holds the whole iteration cannot ask how many tokens are masked.
        self._skip_masked = config.cuda_graph_impl != "full_iteration"
        refused = {
            "--use-mup": config.use_mup,
            "--mtp-num-layers": config.mtp_num_layers,
            "--defer-embedding-wgrad-compute": config.defer_embedding_wgrad_compute,
            "--fp8-output-proj": is_mxfp8_output_proj_active(config),
        }
        fused = kernels.cross_entropy not in OF_ENGINE or teacher is not None
        for flag, given in refused.items():
            if given and fused:
                raise ConfigError(
                    f"{flag} changes the output layer in a way that the fused loss does not know; "
                    "the model must go without it here. Take the flag out, or, without a teacher, "
                    "choose --mlr1-kernels linear_cross_entropy=reference."
                )

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: Tensor | None,
        labels: Tensor,
        loss_mask: Tensor,
        context: Lesson | None,
        compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
        **_: Any,
    ) -> MicroBatchLoss:
        """Compute the loss of a micro-batch, as `GPTModel` asks for it.

        Args:
            hidden_states: [S, B, D], or [S / TP, B, D] with sequence parallelism.
            output_layer: the model's.
            output_weight: the shared embedding, or None where the output layer has its own.
            labels: [B, S].
            loss_mask: [B, S].
            context: the teacher's part, or None for the cross-entropy alone.
            compute_language_model_loss: the model's, for the reference.
            **_: what else the engine offers.
        """
        batch = _Batch(
            hidden=hidden_states,
            labels=labels.transpose(0, 1),
            mask=loss_mask.transpose(0, 1),
            output_layer=output_layer,
            output_weight=output_weight,
            model_loss=compute_language_model_loss,
        )
        if self._kernels.cross_entropy not in OF_ENGINE or context is not None:
            _let_parameters_arrive(output_layer)
        if context is None:
            num_ids = self._vocab_size if self._teacher is None else self._teacher.num_ids
            return self._cross_entropy(batch, num_ids)
        if context.alpha == 0:
            # Bit by bit the run without a teacher, whose numbers for the log come by themselves.
            alone = self._cross_entropy(batch, self._vocab_size)
            with torch.no_grad():
                told = self._distilled(batch, context)
            return replace(alone, report=told.report | alone.report)
        return self._distilled(batch, context)

    def _cross_entropy(
        self, batch: _Batch, num_ids: int, *, foresees: bool = True
    ) -> MicroBatchLoss:
        """Compute the cross-entropy alone.

        Args:
            batch: the micro-batch.
            num_ids: ids that have a probability.
            foresees: whether the loss goes on to the schedule as it is.
        """
        kernel = self._kernels.cross_entropy
        if kernel in OF_ENGINE:
            losses = self._losses_of_logits(batch, kernel)
            total, tokens, report = masked_sum(losses, batch.mask)
            return MicroBatchLoss(total=total, tokens=tokens, report=report)
        if kernel in LIBRARY_LOSSES:
            return summed_by(
                LIBRARY_LOSSES[kernel],
                batch.hidden,
                batch.weight[:num_ids],
                batch.labels,
                batch.mask,
            )
        return linear_language_model_loss(
            batch.hidden,
            batch.weight,
            batch.labels,
            batch.mask,
            parallel=batch.parallel(num_ids),
            chunks=self._chunks(batch.mask),
            deliver=self._deliver(batch) if foresees else add_to_main_grad,
        )

    def _losses_of_logits(self, batch: _Batch, kernel: str) -> Tensor:
        """Make all logits, and the cross-entropy of each token, [S, B]."""
        logits = batch.logits()
        if kernel == "reference":
            return batch.model_loss(batch.labels.transpose(0, 1), logits).transpose(0, 1)
        from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

        losses: Tensor = te_parallel_cross_entropy(
            logits, batch.labels.contiguous(), batch.output_layer.tp_group, not self._skip_masked
        )
        return losses

    def _distilled(self, batch: _Batch, lesson: Lesson) -> MicroBatchLoss:
        assert self._teacher is not None, "a lesson has a teacher"
        student = Head(hidden=batch.hidden, weight=batch.weight)
        parallel = batch.parallel(self._teacher.num_ids)
        if self._kernels.divergence == "mlr1":
            masks = (batch.mask,) if lesson.mask is None else (batch.mask, lesson.mask)
            return distillation_loss(
                student,
                lesson,
                batch.labels,
                batch.mask,
                teacher_weight=self._teacher.weight,
                parallel=parallel,
                chunks=self._chunks(*masks),
                deliver=self._deliver(batch),
            )
        assert self._teacher.weight is not None, "hidden states need the teacher's head"
        alone = self._cross_entropy(batch, self._teacher.num_ids, foresees=False)
        # The cross-entropy may bring its part of the gradient past autograd and have the engine
        # drop what autograd has: then the other part must go the same way.
        weight: Tensor = _ToMainGrad.apply(batch.weight)  # type: ignore[no-untyped-call]
        return divergence_loss(
            alone,
            replace(student, weight=weight),
            lesson,
            batch.mask,
            teacher_weight=self._teacher.weight,
            num_ids=self._teacher.num_ids,
            kernel=self._kernels.divergence,
        )

    def _chunks(self, *masks: Tensor) -> Chunks:
        rows = counted_rows(*(mask.reshape(-1) for mask in masks)) if self._skip_masked else None
        return Chunks(rows=rows, logits=self._kernels.logits_dtype)

    def _deliver(self, batch: _Batch) -> Deliver | Foreseen:
        """Say how the head's gradient gets to where the engine gathers gradients."""
        into = getattr(batch.weight, "main_grad", None)
        if (
            self._num_micro_batches is None
            or into is None
            or into.dtype != wide_dtype(batch.weight.dtype)
            or not torch.is_grad_enabled()
        ):
            return add_to_main_grad
        factor = factor_of_backward(self._config, batch.mask, self._num_micro_batches())
        return Foreseen(factor=factor, into=into, arrived=mark_arrived)


def factor_of_backward(config: TransformerConfig, mask: Tensor, num_micro_batches: int) -> Tensor:
    """Give what the engine's schedule will multiply the gradient of a micro-batch's sum by.

    It divides a loss by the micro-batch's tokens and by the number of micro-batches, unless the
    loss is per token, and multiplies it by the optimizer's loss scale
    (`megatron.core.pipeline_parallel.schedules`: `forward_step_calc_loss`, `backward_step`).

    Args:
        config: of the model, to which training has tied the optimizer.
        mask: 1 where a token counts.
        num_micro_batches: of the step, for each copy of the model.

    Returns:
        one element, fp32, on the mask's device.
    """
    factor = torch.ones((), device=mask.device)
    if config.grad_scale_func is not None:
        factor = config.grad_scale_func(factor).reshape(())
    if config.calculate_per_token_loss:
        return factor
    return factor / mask.sum().int().clamp(min=1) / num_micro_batches


def _let_parameters_arrive(output_layer: ColumnParallelLinear) -> None:
    """Wait for the output layer's parameters as its forward would, which is not called here.

    With --overlap-param-gather a hook on each module waits for the parameters that other ranks
    updated, and asks for the next ones.
    """
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())


def add_to_main_grad(weight: Tensor, grad: Tensor, factor: Tensor) -> Tensor | None:
    """Add a gradient in fp32 to where the engine gathers gradients; see `Deliver`."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return add_to_grad(weight, grad, factor)
    main_grad.addcmul_(grad, factor)
    return mark_arrived(weight)


class _ToMainGrad(torch.autograd.Function):
    """Hands a weight on, and adds its gradient to the main gradient where there is one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        main_grad = getattr(ctx.weight, "main_grad", None)
        if main_grad is None:
            return grad
        main_grad.add_(grad)
        return None


def mark_arrived(weight: Tensor) -> Tensor | None:
    """Tell the engine that a weight's gradient is in its main gradient; see `Foreseen`.

    The engine's hook runs when autograd has a gradient for the weight. A weight of its own gets one
    whose content nobody reads, as after the engine's own fused products; a shared embedding gets
    one from its input side, which the hook adds although the head's is there already.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(weight, "zero_out_wgrad", False):
        return None
    return torch.empty_like(weight)
