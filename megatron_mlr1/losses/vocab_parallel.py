"""A linear head whose vocabulary is split over a group of processes, and its gradient's way back.

Each process has an equal share of the padded vocabulary's rows, in the order of its rank. What the
shards exchange a chunk is a few numbers a token; the gradient of the hidden states, to which every
shard adds its part, is summed once at the end, in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from megatron_mlr1.ops.head_chunks import HeadGradients, Shard, Wanted

Deliver = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""Takes a weight, the gradient of a loss with respect to it in the wide type, and a factor on the
device; gives what autograd is to add to `weight.grad`, or None if it brought the gradient there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreseen:
    """In place of a `Deliver`: the factor of the backward is known before the forward.

    Both gradients are made times the factor then, and the weight's is added at once to where it
    belongs: neither is kept whole for a second pass in the backward, which only verifies that the
    factor is the one that was foreseen.
    """

    factor: Tensor
    """One element, on the device."""

    into: Tensor
    """[V, D] in the wide type: where the weight's gradient belongs."""

    arrived: Callable[[Tensor], Tensor | None]
    """Takes the weight in the backward, when all is there; gives what autograd is to add."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorParallel:
    """How a head is split."""

    group: ProcessGroup | None
    """Processes that share the vocabulary; None for one process."""

    num_ids: int
    """Ids of the whole vocabulary; the rows of the weights behind them are padding."""

    sequence: bool = False
    """Whether hidden states are split too, by their first dimension, over the same group."""

    @property
    def size(self) -> int:
        """Processes that share the vocabulary."""
        return 1 if self.group is None else self.group.size()

    def shard(self, rows: int) -> Shard:
        """Say which ids this process has, if its weight has so many rows."""
        rank = 0 if self.group is None else self.group.rank()
        first = rank * rows
        num_ids = min(max(self.num_ids - first, 0), rows)
        if self.size == 1:
            return Shard(first_id=first, num_ids=num_ids)
        return Shard(
            first_id=first,
            num_ids=num_ids,
            max_across=partial(_reduce, group=self.group, how=ReduceOp.MAX),
            sum_across=partial(_reduce, group=self.group, how=ReduceOp.SUM),
        )

    def gathered(self, part: Tensor) -> Tensor:
        """Give all rows of a tensor of which each process has a part, if sequences are split."""
        if not self.sequence or self.size == 1:
            return part
        whole = part.new_empty((part.size(0) * self.size, *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=self.group)
        return whole

    def summed(self, grad: Tensor) -> Tensor:
        """Add up the shards' gradients of hidden states; give the part that belongs here."""
        if self.size == 1:
            return grad
        if not self.sequence:
            dist.all_reduce(grad, group=self.group)
            return grad
        part = grad.new_empty((grad.size(0) // self.size, *grad.shape[1:]))
        dist.reduce_scatter_tensor(part, grad, group=self.group)
        return part


def _reduce(tensor: Tensor, group: ProcessGroup | None, how: ReduceOp.RedOpType) -> None:
    dist.all_reduce(tensor, op=how, group=group)


def wanted(hidden: Tensor, weight: Tensor, deliver: Deliver | Foreseen) -> Wanted:
    """Ask for the gradients that a backward could take; none in an evaluation."""
    on = torch.is_grad_enabled()
    to_hidden, to_weight = on and hidden.requires_grad, on and weight.requires_grad
    if not isinstance(deliver, Foreseen):
        return Wanted(hidden=to_hidden, weight=to_weight)
    return Wanted(hidden=to_hidden, weight=to_weight, factor=deliver.factor, into=deliver.into)


def with_gradients(
    total: Tensor,
    hidden: Tensor,
    weight: Tensor,
    gradients: HeadGradients,
    parallel: TensorParallel,
    deliver: Deliver | Foreseen,
) -> Tensor:
    """Tie a sum to the gradients that were made with it, and give it as a node of the graph.

    Args:
        total: scalar.
        hidden: what the head read: this process's part, any shape [..., D].
        weight: its rows of the head.
        gradients: of `total`, or of `total` times the factor that is foreseen, from this shard of
            the vocabulary.
        parallel: how the head is split.
        deliver: what becomes of the weight's gradient in the backward, or what became of it.
    """
    grad_hidden, grad_weight = gradients.hidden, gradients.weight
    if grad_hidden is not None:
        grad_hidden = parallel.summed(grad_hidden).view_as(hidden).to(hidden.dtype)
    if isinstance(deliver, Foreseen):
        tied: Tensor = _GradientsDelivered.apply(  # type: ignore[no-untyped-call]
            hidden, weight, total, grad_hidden, deliver
        )
        return tied
    tied = _GradientsMadeBefore.apply(  # type: ignore[no-untyped-call]
        hidden, weight, total, grad_hidden, grad_weight, deliver
    )
    return tied


def add_to_grad(weight: Tensor, grad: Tensor, factor: Tensor) -> Tensor:
    """Hand the gradient to autograd in the weight's type: the `Deliver` of plain torch."""
    return (grad * factor).to(weight.dtype)


class _GradientsMadeBefore(torch.autograd.Function):
    """Passes a scalar on; its backward scales gradients that exist, on the device."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        total: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
        deliver: Deliver,
    ) -> Tensor:
        ctx.save_for_backward(grad_hidden, grad_weight)
        # Kept as an object: its main gradient and marks are looked for on it.
        ctx.weight, ctx.deliver = weight, deliver
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        to_hidden = to_weight = None
        if grad_hidden is not None:
            # Wide: a factor that is rounded to bf16 is off for every token alike, by up to 2^-9.
            to_hidden = (grad_hidden.to(factor.dtype) * factor).to(grad_hidden.dtype)
        if grad_weight is not None:
            to_weight = ctx.deliver(ctx.weight, grad_weight, factor)
        return to_hidden, to_weight, None, None, None, None


class _GradientsDelivered(torch.autograd.Function):
    """Passes a scalar on; its backward verifies a factor that is in the gradients already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        total: Tensor,
        grad_hidden: Tensor | None,
        foreseen: Foreseen,
    ) -> Tensor:
        ctx.save_for_backward(grad_hidden)
        ctx.weight, ctx.foreseen = weight, foreseen
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        foreseen: Foreseen = ctx.foreseen
        expected = foreseen.factor.to(factor.dtype).reshape(())
        # On the device, so that nobody waits for it.
        torch._assert_async(
            torch.isclose(factor.reshape(()), expected, rtol=1e-5, atol=0),
            "The backward came with another factor than the loss head foresaw from the schedule; "
            "the gradients in main_grad are wrong by their quotient.",
        )
        to_weight = foreseen.arrived(ctx.weight) if ctx.needs_input_grad[1] else None
        return grad_hidden, to_weight, None, None, None
