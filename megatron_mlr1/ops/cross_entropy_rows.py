r"""Row arithmetic of `linear_cross_entropy`: what one chunk of logits goes through.

Three ops, which compiled rows may replace. On a whole vocabulary `mlr1::cross_entropy_` reads and
writes each logit once. On one shard of it `mlr1::cross_entropy_partials` reads each logit once and
`mlr1::cross_entropy_gradient_` reads and writes each once; what the shards tell each other lies
between them.

Logits are fp32, fp64, bf16 or fp16; all that is summed or given back per token is fp32, of fp64
logits fp64. A gradient is written in `dtype`, the logits' own or a narrower one, to
`rows_in(logits_CV, dtype)`; each element is rounded once.
"""

import torch
from torch import Tensor

import megatron_mlr1.ops.extension  # noqa: F401  registers the compiled rows
from megatron_mlr1.ops.head_chunks import row_blocks, rows_in
from megatron_mlr1.ops.wide_matmul import wide_dtype


def widened(logits_BV: Tensor) -> Tensor:
    """Give logits in the type in which they are reckoned with; the very same where they are."""
    return logits_BV.to(wide_dtype(logits_BV.dtype))


def logit_at(logits_CV: Tensor, column_C: Tensor) -> Tensor:
    """Take one logit of each row, [C]; zero where the column is -1."""
    if not logits_CV.size(1):
        return widened(logits_CV.new_zeros(logits_CV.size(0)))
    found = widened(logits_CV.gather(1, column_C.clamp(min=0)[:, None])[:, 0])
    return torch.where(column_C >= 0, found, 0)


def add_at_(logits_CV: Tensor, column_C: Tensor, value_C: Tensor) -> None:
    """Add a value to one element of each row; nowhere where the column is -1."""
    if logits_CV.size(1):
        value_C = torch.where(column_C >= 0, value_C, 0)
        logits_CV.scatter_add_(1, column_C.clamp(min=0)[:, None], value_C[:, None])


def top_of(logits_BV: Tensor) -> Tensor:
    """Give the largest logit of each row, [B]; -inf where this shard has no ids."""
    if not logits_BV.size(1):
        return widened(logits_BV.new_full((logits_BV.size(0),), float("-inf")))
    return widened(logits_BV.amax(1))


def statistics(logits_CV: Tensor, count: int) -> Tensor:
    """Make zeros [count, C] in the type of what is given back per token."""
    return logits_CV.new_zeros(count, logits_CV.size(0), dtype=wide_dtype(logits_CV.dtype))


def cross_entropy_partials_reference(logits_CV: Tensor, label_C: Tensor) -> Tensor:
    """Define `cross_entropy_partials`."""
    out_3C = statistics(logits_CV, 3)
    for rows in row_blocks(logits_CV):
        logits = widened(logits_CV[rows])
        top_B = top_of(logits)
        out_3C[0, rows] = top_B
        out_3C[1, rows] = (logits - top_B[:, None]).exp_().sum(1)
    out_3C[2] = logit_at(logits_CV, label_C)
    return out_3C


@torch.library.custom_op("mlr1::cross_entropy_partials", mutates_args=())
def cross_entropy_partials(logits_CV: Tensor, label_C: Tensor) -> Tensor:
    """Summarise the rows of one shard: [3, C] of max z, sum e^(z - max) and z at the label.

    Args:
        logits_CV: z.
        label_C: column of the label, int64; -1 where another shard has it, which counts as zero.
    """
    return cross_entropy_partials_reference(logits_CV, label_C)


@cross_entropy_partials.register_fake
def _(logits_CV: Tensor, label_C: Tensor) -> Tensor:
    return statistics(logits_CV, 3)


def cross_entropy_gradient_reference(
    logits_CV: Tensor,
    label_C: Tensor,
    lse_C: Tensor,
    pull_C: Tensor,
    weight_C: Tensor,
    dtype: torch.dtype,
) -> None:
    """Define `cross_entropy_gradient_`."""
    for rows in row_blocks(logits_CV):
        gradient = (widened(logits_CV[rows]) - lse_C[rows, None]).exp_().mul_(pull_C[rows, None])
        add_at_(gradient, label_C[rows], -weight_C[rows])
        rows_in(logits_CV, dtype)[rows] = gradient


@torch.library.custom_op("mlr1::cross_entropy_gradient_", mutates_args=("logits_CV",))
def cross_entropy_gradient_(
    logits_CV: Tensor,
    label_C: Tensor,
    lse_C: Tensor,
    pull_C: Tensor,
    weight_C: Tensor,
    dtype: torch.dtype,
) -> None:
    """Overwrite logits by pull * e^(z - lse) - weight * e_label.

    Args:
        logits_CV: z of one shard; overwritten.
        label_C: column of the label; -1 where another shard has it.
        lse_C: log sum exp over the whole vocabulary.
        pull_C: factor of the softmax.
        weight_C: what is taken off at the label.
        dtype: of the gradient.
    """
    cross_entropy_gradient_reference(logits_CV, label_C, lse_C, pull_C, weight_C, dtype)


@cross_entropy_gradient_.register_fake
def _(
    logits_CV: Tensor,
    label_C: Tensor,
    lse_C: Tensor,
    pull_C: Tensor,
    weight_C: Tensor,
    dtype: torch.dtype,
) -> None:
    return None


def cross_entropy_reference(
    logits_CV: Tensor, label_C: Tensor, weight_C: Tensor, z_loss: float, dtype: torch.dtype
) -> Tensor:
    """Define `cross_entropy_`."""
    top_C, sum_C, label_z_C = cross_entropy_partials_reference(logits_CV, label_C)
    lse_C = top_C + sum_C.log()
    pull_C = weight_C * (1 + 2 * z_loss * lse_C)
    cross_entropy_gradient_reference(logits_CV, label_C, lse_C, pull_C, weight_C, dtype)
    rows_in(logits_CV, dtype)[weight_C == 0] = 0
    return torch.stack((lse_C, label_z_C))


@torch.library.custom_op("mlr1::cross_entropy_", mutates_args=("logits_CV",))
def cross_entropy_(
    logits_CV: Tensor, label_C: Tensor, weight_C: Tensor, z_loss: float, dtype: torch.dtype
) -> Tensor:
    """Do both in one pass: overwrite logits by weight * [q (1 + 2 z_loss lse) - e_label].

    Args:
        logits_CV: z over the whole vocabulary; overwritten.
        label_C: column of the label; -1 for none, which counts as zero.
        weight_C: of each token; a token of weight 0 has a gradient of zeros, whatever its logits.
        z_loss: zeta of `linear_cross_entropy`.
        dtype: of the gradient.

    Returns:
        [2, C]: log sum exp, and z at the label.
    """
    return cross_entropy_reference(logits_CV, label_C, weight_C, z_loss, dtype)


@cross_entropy_.register_fake
def _(
    logits_CV: Tensor, label_C: Tensor, weight_C: Tensor, z_loss: float, dtype: torch.dtype
) -> Tensor:
    return statistics(logits_CV, 2)
