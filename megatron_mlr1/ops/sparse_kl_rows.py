r"""Row arithmetic of `linear_sparse_kl`: what one chunk of logits goes through.

Two ops, which compiled rows may replace: `mlr1::sparse_kl_partials` reads each logit once,
`mlr1::sparse_kl_gradient_` reads and writes each once. The formulas stand in `linear_sparse_kl`;
for types see `cross_entropy_rows`.
"""

import torch
from torch import Tensor

import megatron_mlr1.ops.extension  # noqa: F401  registers the compiled rows
from megatron_mlr1.ops.cross_entropy_rows import add_at_, logit_at, statistics, top_of, widened
from megatron_mlr1.ops.head_chunks import row_blocks, rows_in


def sparse_kl_partials_reference(
    logits_CV: Tensor,
    label_C: Tensor,
    column_CK: Tensor,
    weight_CK: Tensor,
    temperature: float,
    bucket: bool,
) -> Tensor:
    """Define `sparse_kl_partials`."""
    out = statistics(logits_CV, 6)
    out[0] = top_of(logits_CV)
    out[4] = logit_at(logits_CV, label_C)
    if not logits_CV.size(1):
        return out
    here_CK, index_CK = column_CK >= 0, column_CK.clamp(min=0)
    given = torch.where(here_CK, widened(logits_CV.gather(1, index_CK)) * weight_CK, 0)
    out[5] = given.sum(1) / temperature
    erase_CK = _erase(here_CK, out.dtype)
    for rows in row_blocks(logits_CV):
        z = widened(logits_CV[rows]) - out[0, rows, None]
        hot = (z / temperature).exp_()
        out[2, rows] = hot.sum(1)
        out[1, rows] = out[2, rows] if temperature == 1 else z.exp_().sum(1)
        if bucket:
            out[3, rows] = hot.scatter_reduce_(1, index_CK[rows], erase_CK[rows], "amin").sum(1)
    return out


@torch.library.custom_op("mlr1::sparse_kl_partials", mutates_args=())
def sparse_kl_partials(
    logits_CV: Tensor,
    label_C: Tensor,
    column_CK: Tensor,
    weight_CK: Tensor,
    temperature: float,
    bucket: bool,
) -> Tensor:
    """Summarise the rows of one shard.

    Args:
        logits_CV: z.
        label_C: column of the label, int64; -1 where another shard has it.
        column_CK: columns of the target's ids, int64; -1 where another shard has one.
        weight_CK: their weights.
        temperature: T.
        bucket: whether the sum over the other ids is wanted.

    Returns:
        [6, C]: max z; sum e^(z - max), sum e^((z - max) / T), the latter over the ids that are not
        in `column_CK` (zero unless `bucket`); z at the label; sum of weight * z / T.
    """
    return sparse_kl_partials_reference(
        logits_CV, label_C, column_CK, weight_CK, temperature, bucket
    )


def _erase(here_CK: Tensor, dtype: torch.dtype) -> Tensor:
    """Give what a minimum with positive numbers makes zero; it leaves column 0, for which the ids
    of other shards stand, alone."""
    return torch.where(here_CK, 0.0, float("inf")).to(dtype)


@sparse_kl_partials.register_fake
def _(
    logits_CV: Tensor,
    label_C: Tensor,
    column_CK: Tensor,
    weight_CK: Tensor,
    temperature: float,
    bucket: bool,
) -> Tensor:
    return statistics(logits_CV, 6)


def sparse_kl_gradient_reference(  # noqa: PLR0913  as the schema of the op has them
    logits_CV: Tensor,
    label_C: Tensor,
    column_CK: Tensor,
    weight_CK: Tensor,
    rows_3C: Tensor,
    weights_3C: Tensor,
    temperature: float,
    bucket: bool,
    dtype: torch.dtype,
) -> None:
    """Define `sparse_kl_gradient_`."""
    if not logits_CV.size(1):
        return
    here_CK, index_CK = column_CK >= 0, column_CK.clamp(min=0)
    lse_hot_C, outside_C, kd_C = rows_3C[1], rows_3C[2], weights_3C[2]
    pull_CK = -weight_CK
    if bucket:
        given_CK = widened(logits_CV.gather(1, index_CK))
        pull_CK += (given_CK / temperature - lse_hot_C[:, None]).exp_()
    pull_CK = torch.where(here_CK, pull_CK * kd_C[:, None], 0)
    erase_CK = _erase(here_CK, rows_3C.dtype)
    for rows in row_blocks(logits_CV):
        logits = widened(logits_CV[rows])
        hot = (logits / temperature).sub_(lse_hot_C[rows, None]).exp_()
        if bucket:
            # Their q' comes back by itself below: times the factor, which may be huge, and undone
            # again, it would lose its digits.
            hot.scatter_reduce_(1, index_CK[rows], erase_CK[rows], "amin")
        hot.mul_((kd_C[rows] * outside_C[rows])[:, None])
        gradient = (logits - rows_3C[0, rows, None]).exp_().mul_(weights_3C[0, rows, None])
        gradient.add_(hot)
        # Added, never assigned: an id may come twice, and another shard's stands for column 0.
        gradient.scatter_add_(1, index_CK[rows], pull_CK[rows])
        add_at_(gradient, label_C[rows], -weights_3C[1, rows])
        rows_in(logits_CV, dtype)[rows] = gradient


@torch.library.custom_op("mlr1::sparse_kl_gradient_", mutates_args=("logits_CV",))
def sparse_kl_gradient_(  # noqa: PLR0913  as the schema of the op has them
    logits_CV: Tensor,
    label_C: Tensor,
    column_CK: Tensor,
    weight_CK: Tensor,
    rows_3C: Tensor,
    weights_3C: Tensor,
    temperature: float,
    bucket: bool,
    dtype: torch.dtype,
) -> None:
    """Overwrite z by pull * q - weight * e_label + kd * g.

    Args:
        logits_CV: z of one shard, overwritten.
        label_C: column of the label; -1 where another shard has it.
        column_CK: columns of the target's ids; -1 where another shard has one.
        weight_CK: their weights.
        rows_3C: log sum exp of z and of z / T over the whole vocabulary; for a bucket the factor of
            q' at the ids that are not in `column_CK`, else 1.
        weights_3C: pull, weight, kd = w_kd T.
        temperature: T.
        bucket: whether `column_CK` names each id once and all others are one event.
        dtype: of the gradient.
    """
    sparse_kl_gradient_reference(
        logits_CV,
        label_C,
        column_CK,
        weight_CK,
        rows_3C,
        weights_3C,
        temperature,
        bucket,
        dtype,
    )


@sparse_kl_gradient_.register_fake
def _(  # noqa: PLR0913  as the schema of the op has them
    logits_CV: Tensor,
    label_C: Tensor,
    column_CK: Tensor,
    weight_CK: Tensor,
    rows_3C: Tensor,
    weights_3C: Tensor,
    temperature: float,
    bucket: bool,
    dtype: torch.dtype,
) -> None:
    return None
