"""Output layer and loss of a `GPTModel` in one: the engine's own place for such a thing.

`GPTModel.forward` takes an `output_processor`, which runs in place of output layer and loss once
the last stage has its hidden states, and an `output_processor_context` that it hands on. A
`LossHead` is that processor. So no class of the engine is derived or replaced, checkpoints and
names stay, and whoever gives no processor (inference, conversion) gets logits by the normal path.
The context is the teacher's part in the micro-batch, or None.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core.fp8_utils import is_mxfp8_output_proj_active
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.losses.distillation import Lesson, distillation_loss
from megatron_mlr1.losses.language_model import (
    MicroBatchLoss,
    linear_language_model_loss,
    masked_sum,
)
from megatron_mlr1.losses.vocab_parallel import TensorParallel, add_to_grad
from megatron_mlr1.ops.head_chunks import Chunks
from megatron_mlr1.ops.linear_kl import Head


class LossHead:
    """What a training or evaluation step gives to the model as its `output_processor`."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        kernel: Literal["mlr1", "reference"],
        teacher_weight: Tensor | None = None,
    ) -> None:
        """Take what does not change between micro-batches.

        Args:
            config: of the model.
            vocab_size: ids that exist. "mlr1" gives no probability to the rows with which the
                engine pads its table, "reference" gives them what their logits say.
            kernel: "mlr1" is the fused op; "reference" is the engine's output layer, and its
                cross-entropy over a tensor of all logits.
            teacher_weight: this process's rows of the teacher's head, for hidden states.

        Raises:
            ConfigError: the model's head does something that the kernel has no formula for.
        """
        self._vocab_size, self._kernel, self._teacher_weight = vocab_size, kernel, teacher_weight
        # A graph that holds the whole iteration cannot ask how many tokens are masked.
        self._skip_masked = config.cuda_graph_impl != "full_iteration"
        refused = {
            "--use-mup": config.use_mup,
            "--mtp-num-layers": config.mtp_num_layers,
            "--defer-embedding-wgrad-compute": config.defer_embedding_wgrad_compute,
            "--fp8-output-proj": is_mxfp8_output_proj_active(config),
        }
        for flag, given in refused.items():
            if given and kernel == "mlr1":
                raise ConfigError(
                    f"{flag} changes the output layer in a way that the fused loss does not know; "
                    "the model must go without it here. Take the flag out, or choose "
                    "--mlr1-kernels linear_cross_entropy=reference."
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
        if self._kernel == "reference" and context is None:
            logits, _bias = output_layer(hidden_states, weight=output_weight)
            losses = compute_language_model_loss(labels, logits)
            total, tokens, report = masked_sum(losses, loss_mask)
            return MicroBatchLoss(total=total, tokens=tokens, report=report)
        _let_parameters_arrive(output_layer)
        weight = output_layer.weight if output_weight is None else output_weight
        parallel = TensorParallel(
            group=output_layer.tp_group,
            num_ids=self._vocab_size,
            sequence=output_layer.sequence_parallel,
        )
        # In the order of the hidden states.
        labels_SB, mask_SB = labels.transpose(0, 1), loss_mask.transpose(0, 1)
        if context is None:
            return linear_language_model_loss(
                hidden_states,
                weight,
                labels_SB,
                mask_SB,
                parallel=parallel,
                chunks=None if self._skip_masked else Chunks(),
                deliver=add_to_main_grad,
            )
        return distillation_loss(
            Head(hidden=hidden_states, weight=weight),
            context,
            labels_SB,
            mask_SB,
            teacher_weight=self._teacher_weight,
            parallel=parallel,
            skip_masked=self._skip_masked,
            deliver=add_to_main_grad,
        )


def _let_parameters_arrive(output_layer: ColumnParallelLinear) -> None:
    """Wait for the output layer's parameters as its forward would, which is not called here.

    With --overlap-param-gather a hook on each module waits for the parameters that other ranks
    updated, and asks for the next ones.
    """
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())


def add_to_main_grad(weight: Tensor, grad: Tensor, factor: Tensor) -> Tensor | None:
    """Add a gradient in fp32 to where the engine gathers gradients; see `Deliver`.

    The engine's hook runs when autograd has a gradient for the weight. A weight of its own gets one
    whose content nobody reads, as after the engine's own fused products; a shared embedding gets
    one from its input side, which the hook adds although the head's is there already.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return add_to_grad(weight, grad, factor)
    main_grad.addcmul_(grad, factor)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(weight, "zero_out_wgrad", False):
        return None
    return torch.empty_like(weight)
