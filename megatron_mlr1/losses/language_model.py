"""The language-model loss of one micro-batch, as the engine's schedules take it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mlr1.losses.vocab_parallel import (
    Deliver,
    Foreseen,
    TensorParallel,
    add_to_grad,
    wanted,
    with_gradients,
)
from megatron_mlr1.ops.head_chunks import Chunks
from megatron_mlr1.ops.libraries import LEFT_OUT
from megatron_mlr1.ops.linear_cross_entropy import linear_cross_entropy
from megatron_mlr1.ops.wide_matmul import wide_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchLoss:
    """What a micro-batch gives to the engine."""

    total: Tensor
    """Sum over the tokens that count, scalar, fp32; the gradient flows from it."""

    tokens: Tensor
    """How many count, int32 scalar: what the engine divides by."""

    report: dict[str, Tensor]
    """For the log: [sum, tokens] by name, fp32. The engine adds them up over micro-batches and
    ranks before it divides, so that each token weighs the same wherever it was."""


def masked_sum(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses of the tokens that count.

    Args:
        losses: cross-entropy of each token in nats, any shape.
        loss_mask: 1 where the token counts and 0 where not, as many elements as `losses`.

    Returns:
        the fields of a `MicroBatchLoss` in their order, with `{"lm loss": [sum, tokens]}`.
    """
    mask = loss_mask.reshape(-1).float()
    total = torch.sum(losses.reshape(-1).float() * mask)
    tokens = mask.sum().detach()
    # The schedules divide the loss in place, so the log takes a copy.
    report = torch.stack((total.detach().clone(), tokens))
    return total, tokens.to(torch.int), {"lm loss": report}


def summed_by(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
) -> MicroBatchLoss:
    """Have another implementation of head and loss sum over the tokens that count.

    Args:
        function: takes hidden states [N, D], the whole head and labels [N], and gives the sum of
            cross-entropies of the tokens that are not `libraries.LEFT_OUT`; see `ops.libraries`.
        hidden: [..., D].
        weight_VD: the whole head, without padding.
        labels: ids, as many elements as there are tokens, in the same order.
        loss_mask: 1 where a token counts and 0 where not, like `labels`.
    """
    mask_N = loss_mask.reshape(-1)
    labels_N = labels.reshape(-1).masked_fill(mask_N == 0, LEFT_OUT)
    total = function(hidden.reshape(-1, hidden.size(-1)), weight_VD, labels_N)
    tokens = mask_N.float().sum()
    report = torch.stack((total.detach().float(), tokens))
    return MicroBatchLoss(total=total, tokens=tokens.to(torch.int), report={"lm loss": report})


def counted_rows(*masks_N: Tensor) -> Tensor:
    """Give the places, int64, of the tokens that any of the masks counts; waits for the device."""
    counted_N = masks_N[0] != 0
    for mask_N in masks_N[1:]:
        counted_N = counted_N | (mask_N != 0)
    return counted_N.nonzero()[:, 0]


def linear_language_model_loss(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    parallel: TensorParallel,
    chunks: Chunks | None = None,
    z_loss: float = 0.0,
    deliver: Deliver | Foreseen = add_to_grad,
) -> MicroBatchLoss:
    """Compute head and loss together, without a tensor of tokens x vocabulary.

    Args:
        hidden: [..., D]; this process's part of the tokens, if sequences are split.
        weight_VD: this process's rows of the head, padding included.
        labels: ids, as many elements as there are tokens in all parts, in the same order.
        loss_mask: 1 where a token counts and 0 where not, like `labels`.
        parallel: how the head is split.
        chunks: which tokens take part, and their logits; None leaves out the masked ones, for
            which it waits for the device once.
        z_loss: factor of (log sum exp)^2 in the loss; the log has the cross-entropy alone.
        deliver: what becomes of the head's gradient.
    """
    mask_N = loss_mask.reshape(-1).to(wide_dtype(weight_VD.dtype))
    result = linear_cross_entropy(
        parallel.gathered(hidden.detach()).reshape(-1, hidden.size(-1)),
        weight_VD.detach(),
        labels.reshape(-1),
        mask_N,
        shard=parallel.shard(weight_VD.size(0)),
        chunks=chunks or Chunks(rows=counted_rows(mask_N)),
        wanted=wanted(hidden, weight_VD, deliver),
        z_loss=z_loss,
    )
    total = with_gradients(result.total, hidden, weight_VD, result.gradients, parallel, deliver)
    tokens = mask_N.sum()
    report = torch.stack(((result.losses * mask_N).sum(), tokens)).float()
    return MicroBatchLoss(total=total, tokens=tokens.to(torch.int), report={"lm loss": report})
