r"""Row arithmetic of `linear_cross_entropy`: what one chunk of logits goes through.

Two ops, which compiled rows may replace: `mlr1::cross_entropy_partials` reads each logit once,
`mlr1::cross_entropy_gradient_` reads and writes each once. Both work on one shard of the
vocabulary; what the shards tell each other lies between them.
"""

import torch
from torch import Tensor

import megatron_mlr1.ops.extension  # noqa: F401  registers the compiled rows
from megatron_mlr1.ops.head_chunks import row_blocks


def logit_at(logits_CV: Tensor, column_C: Tensor) -> Tensor:
    """Take one logit of each row, [C]; zero where the column is -1."""
    if not logits_CV.size(1):
        return logits_CV.new_zeros(logits_CV.size(0))
    found = logits_CV.gather(1, column_C.clamp(min=0)[:, None])[:, 0]
    return torch.where(column_C >= 0, found, 0)


def add_at_(logits_CV: Tensor, column_C: Tensor, value_C: Tensor) -> None:
    """Add a value to one element of each row; nowhere where the column is -1."""
    if logits_CV.size(1):
        value_C = torch.where(column_C >= 0, value_C, 0)
        logits_CV.scatter_add_(1, column_C.clamp(min=0)[:, None], value_C[:, None])


def top_of(logits_BV: Tensor) -> Tensor:
    """Give the largest logit of each row, [B]; -inf where this shard has no ids."""
    if not logits_BV.size(1):
        return logits_BV.new_full((logits_BV.size(0),), float("-inf"))
    return logits_BV.amax(1)


@torch.library.custom_op("mlr1::cross_entropy_partials", mutates_args=())
def cross_entropy_partials(logits_CV: Tensor, label_C: Tensor) -> Tensor:
    """Summarise the rows of one shard: [3, C] of max z, sum e^(z - max) and z at the label.

    Args:
        logits_CV: fp32 or fp64.
        label_C: column of the label, int64; -1 where another shard has it, which counts as zero.
    """
    out_3C = logits_CV.new_empty(3, logits_CV.size(0))
    for rows in row_blocks(logits_CV):
        top_B = top_of(logits_CV[rows])
        out_3C[0, rows] = top_B
        out_3C[1, rows] = (logits_CV[rows] - top_B[:, None]).exp_().sum(1)
    out_3C[2] = logit_at(logits_CV, label_C)
    return out_3C


@cross_entropy_partials.register_fake
def _(logits_CV: Tensor, label_C: Tensor) -> Tensor:
    return logits_CV.new_empty(3, logits_CV.size(0))


@torch.library.custom_op("mlr1::cross_entropy_gradient_", mutates_args=("logits_CV",))
def cross_entropy_gradient_(
    logits_CV: Tensor, label_C: Tensor, lse_C: Tensor, pull_C: Tensor, weight_C: Tensor
) -> None:
    """Overwrite logits by pull * e^(z - lse) - weight * e_label.

    Args:
        logits_CV: of one shard, fp32 or fp64; overwritten.
        label_C: column of the label; -1 where another shard has it.
        lse_C: log sum exp over the whole vocabulary.
        pull_C: factor of the softmax.
        weight_C: what is taken off at the label.
    """
    for rows in row_blocks(logits_CV):
        logits_CV[rows].sub_(lse_C[rows, None]).exp_().mul_(pull_C[rows, None])
    add_at_(logits_CV, label_C, -weight_C)


@cross_entropy_gradient_.register_fake
def _(logits_CV: Tensor, label_C: Tensor, lse_C: Tensor, pull_C: Tensor, weight_C: Tensor) -> None:
    return None
