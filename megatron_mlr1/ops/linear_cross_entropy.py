r"""Cross-entropy of a linear head, without a tensor of tokens x vocabulary.

With z = hidden @ weight^T, lse = log sum_v e^(z_v), q = e^(z - lse) and the label y of a token:

    cross-entropy = lse - z_y                     z-loss = zeta * lse^2
    d / d z       = weight of the token * [ q * (1 + 2 * zeta * lse) - e_y ]

(z-loss: Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5.) `cross_entropy_rows` has the
row arithmetic, `head_chunks` the loop. A whole vocabulary takes one pass over the logits. One that
is split over devices takes two, with two exchanges a chunk between them: the largest logit of each
token, then the sum of exponentials and the label's logit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mlr1.ops.cross_entropy_rows import (
    cross_entropy_,
    cross_entropy_gradient_,
    cross_entropy_partials,
)
from megatron_mlr1.ops.head_chunks import (
    ALL_TOKENS,
    BOTH_GRADIENTS,
    Chunks,
    HeadGradients,
    Shard,
    Wanted,
    run_chunks,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """What `linear_cross_entropy` gives: everything a backward needs is here already."""

    losses: Tensor
    """[N], fp32 (fp64 for fp64): cross-entropy of each token in nats; zero for tokens left out."""

    total: Tensor
    """Sum over tokens of weight * (cross-entropy + z-loss)."""

    gradients: HeadGradients
    """Of `total`, times `Wanted.factor`."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    *,
    shard: Shard | None = None,
    chunks: Chunks = ALL_TOKENS,
    wanted: Wanted = BOTH_GRADIENTS,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """Compute the cross-entropy of every token, and the gradients of its weighted sum.

    Args:
        hidden_ND: hidden states, fp32, bf16, fp16 or fp64.
        weight_VD: the head in the same type; of a split vocabulary this device's rows.
        labels_N: id of each token's label, int64.
        weights_N: weight of each token in the sum, fp32 (fp64 for fp64).
        shard: the ids that `weight_VD` has; None means all of its rows are the whole vocabulary.
        chunks: which tokens take part, and how many at a time.
        wanted: which gradients to make, and where they go.
        z_loss: zeta above.
    """
    shard = shard or Shard(first_id=0, num_ids=weight_VD.size(0))
    losses_N = torch.zeros_like(weights_N)
    totals_N = torch.zeros_like(weights_N)

    def gradient_in_place(logits_CV: Tensor, place: Tensor | slice, dtype: torch.dtype) -> None:
        label_C, weight_C = shard.local(labels_N[place]), weights_N[place]
        each_C = wanted.weighted(weight_C)
        if wanted.any and shard.is_whole:
            lse_C, target_C = cross_entropy_(logits_CV, label_C, each_C, z_loss, dtype)
        else:
            lse_C, target_C = merged(cross_entropy_partials(logits_CV, label_C), shard)
        if wanted.any and not shard.is_whole:
            pull_C = each_C * (1 + 2 * z_loss * lse_C)
            cross_entropy_gradient_(logits_CV, label_C, lse_C, pull_C, each_C, dtype)
        losses_N[place] = lse_C - target_C
        totals_N[place] = weight_C * (lse_C - target_C + z_loss * lse_C.square())

    gradients = run_chunks(hidden_ND, weight_VD, shard, chunks, wanted, gradient_in_place)
    return CrossEntropy(losses=losses_N, total=totals_N.sum(), gradients=gradients)


def merged(partials_3C: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Make log sum exp and the label's logit, [C] each, of the partial results of all shards."""
    top_C = partials_3C[0].clone()
    shard.max_across(top_C)
    sums_2C = torch.stack((partials_3C[1] * (partials_3C[0] - top_C).exp(), partials_3C[2]))
    shard.sum_across(sums_2C)
    return top_C + sums_2C[0].log(), sums_2C[1]
