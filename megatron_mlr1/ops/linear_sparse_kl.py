r"""Distillation at a linear head against sparse targets: cross-entropy and divergence in one pass.

With c the target's weights by id, q' = softmax(z / T) and the loss of `linear_kl`:

    sampled forms   D = sum_v c_v (-log q'_v) - H(p')            g = q' - c
    tail bucket     D = KL of the k + 1 events (k ids and "all others", with p_t against q_t)
                    g = q' - c at the k ids,  q' (1 - p_t / q_t) at the others

D of the sampled forms is unbiased, so for one token it may be negative: it is not clamped, since
that would stop the token's gradient. q_t is summed over the other ids, not taken as 1 - sum, so
that it keeps its digits when the k ids have almost all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mlr1.ops.head_chunks import (
    ALL_TOKENS,
    BOTH_GRADIENTS,
    Chunks,
    HeadGradients,
    Shard,
    Wanted,
    run_chunks,
)
from megatron_mlr1.ops.linear_kl import Head, TokenWeights
from megatron_mlr1.ops.sparse_kl_rows import sparse_kl_gradient_, sparse_kl_partials
from megatron_mlr1.ops.sparse_targets import SparseTargets


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseDistillation:
    """What `linear_sparse_kl` gives; zero for tokens left out."""

    cross_entropy: Tensor
    """[N]: of the student at temperature 1, in nats."""

    divergence: Tensor
    """[N]: D above, in nats."""

    total: Tensor
    """Sum over tokens of the loss."""

    gradients: HeadGradients
    """Of `total`, times `Wanted.factor`."""


def linear_sparse_kl(
    student: Head,
    targets: SparseTargets,
    labels_N: Tensor,
    weights: TokenWeights,
    *,
    z_loss: float = 0.0,
    shard: Shard | None = None,
    chunks: Chunks = ALL_TOKENS,
    wanted: Wanted = BOTH_GRADIENTS,
) -> SparseDistillation:
    """Compute the loss of every token, and the gradients of its weighted sum.

    Args:
        student: hidden states and head; only read.
        targets: of the same tokens; their form has the temperature.
        labels_N: id of each token's label, int64.
        weights: weights of both parts of the loss.
        z_loss: zeta of `linear_cross_entropy`.
        shard: the ids of the head; None means its rows are the whole vocabulary.
        chunks: which tokens take part, and how many at a time.
        wanted: which gradients to make, and where they go.
    """
    shard = shard or Shard(first_id=0, num_ids=student.weight.size(0))
    temperature, bucket = targets.form.temperature, targets.form.tail_is_bucket
    cross_entropy_N = torch.zeros_like(weights.cross_entropy)
    divergence_N = torch.zeros_like(cross_entropy_N)
    totals_N = torch.zeros_like(cross_entropy_N)

    def gradient_in_place(logits_CV: Tensor, place: Tensor | slice, dtype: torch.dtype) -> None:
        label_C, column_CK = shard.local(labels_N[place]), shard.local(targets.ids[place])
        given_CK, tail_C = targets.weights[place], targets.tail[place]
        partials = sparse_kl_partials(logits_CV, label_C, column_CK, given_CK, temperature, bucket)
        lse_C, lse_hot_C, log_tail_C, label_z_C, dot_C = _merged(partials, temperature, shard)
        kept_C = given_CK.sum(1)
        other_C = torch.where(tail_C > 0, tail_C * (log_tail_C - lse_hot_C), 0)
        divergence_C = kept_C * lse_hot_C - dot_C - other_C - targets.entropy[place]
        outside_C = torch.ones_like(tail_C)
        if bucket:
            # Where q_t is too small for its type, its ids get no gradient either.
            excess_C = (tail_C.log() - (log_tail_C - lse_hot_C)).clamp(max=80)
            outside_C = torch.where(tail_C > 0, 1 - excess_C.exp(), 1)
        ce_C, kd_C = weights.cross_entropy[place], weights.divergence[place]
        cross_entropy_N[place] = lse_C - label_z_C
        divergence_N[place] = divergence_C
        penalised_C = lse_C - label_z_C + z_loss * lse_C.square()
        totals_N[place] = ce_C * penalised_C + kd_C * temperature**2 * divergence_C
        if wanted.any:
            sparse_kl_gradient_(
                logits_CV,
                label_C,
                column_CK,
                given_CK,
                torch.stack((lse_C, lse_hot_C, outside_C)),
                wanted.weighted(
                    torch.stack((ce_C * (1 + 2 * z_loss * lse_C), ce_C, kd_C * temperature))
                ),
                temperature,
                bucket,
                dtype,
            )

    gradients = run_chunks(student.hidden, student.weight, shard, chunks, wanted, gradient_in_place)
    return SparseDistillation(
        cross_entropy=cross_entropy_N,
        divergence=divergence_N,
        total=totals_N.sum(),
        gradients=gradients,
    )


def _merged(partials_6C: Tensor, temperature: float, shard: Shard) -> tuple[Tensor, ...]:
    """Make log sums over the whole vocabulary of all shards' `sparse_kl_partials`, [C] each.

    Returns:
        log sum exp of z, of z / T, of z / T over the ids that were not given; z at the label; the
        sum of weight * z / T over the given ids.
    """
    top_C = partials_6C[0].clone()
    shard.max_across(top_C)
    shift_C = (partials_6C[0] - top_C).clamp(min=-1e30)
    hot_C = (shift_C / temperature).exp()
    _, q, q_hot, rest, label, dot = partials_6C
    sums = torch.stack((q * shift_C.exp(), q_hot * hot_C, rest * hot_C, label, dot))
    shard.sum_across(sums)
    q, q_hot, rest, label, dot = sums
    warm_C = top_C / temperature
    rest = rest.clamp(min=torch.finfo(rest.dtype).tiny)
    return top_C + q.log(), warm_C + q_hot.log(), warm_C + rest.log(), label, dot
