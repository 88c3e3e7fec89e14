r"""Distillation at a linear head: cross-entropy and a divergence from the teacher in one pass.

With z and t the logits of student and teacher (hidden @ weight^T each), temperature T,
q = softmax(z), q' = softmax(z / T), p' = softmax(t / T), label y, and the weights w of a token:

    loss       = w_ce (lse - z_y + zeta lse^2)  +  w_kd T^2 D
    d / d z    = w_ce [ q (1 + 2 zeta lse) - e_y ]  +  w_kd T g

    forward    D = KL(p' || q')          g = q' - p'
    reverse    D = KL(q' || p')          g = q' (log q'/p' - D)
    jsd        D = beta KL(p' || m) + (1 - beta) KL(q' || m),   m = beta p' + (1 - beta) q'
               g = (1 - beta) q' (log q'/m - KL(q' || m))

(T^2: Hinton et al. 2015, arXiv:1503.02531; generalised JSD: Agarwal et al. 2024, "On-Policy
Distillation of Language Models", arXiv:2306.13649, section 3.) Both divergences of Kullback and
Leibler are summed as sum p' (t - z) / T and not as a difference of two entropies, so that little
cancels where the student is close.

`kl_rows` has the row arithmetic, `head_chunks` the loop. A whole vocabulary takes one pass over the
logits of both. A split one exchanges two maxima and ten sums a token and chunk, and for the JSD two
sums more.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_mlr1.ops.head_chunks import (
    ALL_TOKENS,
    BOTH_GRADIENTS,
    Chunks,
    HeadGradients,
    Shard,
    Wanted,
    chunk_size,
    run_chunks,
)
from megatron_mlr1.ops.kl_known import COLUMNS, known_of, sums_at
from megatron_mlr1.ops.kl_rows import jsd_partials, kl_, kl_gradient_, kl_partials
from megatron_mlr1.ops.wide_matmul import logits_into


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """How the student is to follow the teacher."""

    direction: Literal["forward", "reverse", "jsd"] = "forward"
    temperature: float = 1.0
    beta: float = 0.5
    """Share of the teacher in the mixture of the JSD, above 0 and below 1; unused else."""

    z_loss: float = 0.0
    """zeta above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenWeights:
    """What each token weighs in the sum, [N] each in the type of the losses."""

    cross_entropy: Tensor
    divergence: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Hidden states and the rows of a linear head that this device holds."""

    hidden: Tensor
    """[N, D] in the type of `weight`; int8 where `scale` is given."""

    weight: Tensor
    """[V, D] with at least as many rows as the shard has ids."""

    scale: Tensor | None = None
    """[N]: factor of each row of an int8 `hidden`, applied to its logits."""

    def logits_into(self, out_CV: Tensor, place: Tensor | slice) -> None:
        """Write the logits of some tokens over the shard's ids."""
        hidden_CD = self.hidden[place].to(self.weight.dtype)
        logits_into(out_CV, hidden_CD, self.weight[: out_CV.size(1)])
        if self.scale is not None:
            out_CV.mul_(self.scale[place, None])


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """What `linear_kl` gives; all but `total` and `gradients` are [N], zero for tokens left out."""

    cross_entropy: Tensor
    """Of the student at temperature 1, in nats."""

    divergence: Tensor
    """D above, without T^2, in nats."""

    total: Tensor
    """Sum over tokens of the loss above."""

    gradients: HeadGradients
    """Of `total`, times `Wanted.factor`, for the student's hidden states and head."""

    teacher_entropy: Tensor
    """At temperature 1, in nats."""

    teacher_cross_entropy: Tensor
    """Of the teacher on the labels, at temperature 1."""

    agreement: Tensor
    """1 where the teacher's first choice is one of the student's first choices."""

    kl_head: Tensor
    """Part of the forward KL(p' || q') from ids with p' >= `kl_rows.HEAD_PROBABILITY`."""

    kl_tail: Tensor
    """The rest of it."""

    head_mass: Tensor
    """Probability that the teacher gives to its head."""


def linear_kl(
    student: Head,
    teacher: Head,
    labels_N: Tensor,
    weights: TokenWeights,
    *,
    objective: Objective,
    shard: Shard | None = None,
    chunks: Chunks = ALL_TOKENS,
    wanted: Wanted = BOTH_GRADIENTS,
) -> Distillation:
    """Compute the loss of every token, and the gradients of its weighted sum.

    Args:
        student: hidden states and head; only read.
        teacher: its own, over the same ids in the same shards; only read.
        labels_N: id of each token's label, int64.
        weights: weights of both parts of the loss.
        objective: divergence, temperature, z-loss.
        shard: the ids of both weights; None means the student's rows are the whole vocabulary.
        chunks: which tokens take part, and how many at a time.
        wanted: which gradients to make, and where they go.
    """
    shard = shard or Shard(first_id=0, num_ids=student.weight.size(0))
    dtype, device = chunks.logits_dtype(student.weight), student.hidden.device
    # Two rows of logits a token, so half the tokens.
    size = chunks.size or chunk_size(2 * shard.num_ids, device, dtype)
    size = min(size, max(student.hidden.size(0), 1))
    teacher_CV = torch.empty(size, shard.num_ids, dtype=dtype, device=device)
    out_KN = weights.cross_entropy.new_zeros(len(COLUMNS), labels_N.size(0))

    def gradient_in_place(student_CV: Tensor, place: Tensor | slice, dtype: torch.dtype) -> None:
        teacher_cv = teacher_CV[: student_CV.size(0)]
        teacher.logits_into(teacher_cv, place)
        label_C = shard.local(labels_N[place])
        weights_2C = wanted.weighted(
            torch.stack((weights.cross_entropy[place], weights.divergence[place]))
        )
        if shard.is_whole:
            out_KN[:, place] = kl_(
                student_CV,
                teacher_cv,
                label_C,
                weights_2C,
                objective.temperature,
                objective.direction,
                objective.beta,
                objective.z_loss,
                dtype,
            )
        else:
            out_KN[:, place] = _split_chunk(
                student_CV, teacher_cv, label_C, weights_2C, objective, shard, dtype
            )

    chunks = replace(chunks, size=size)
    gradients = run_chunks(student.hidden, student.weight, shard, chunks, wanted, gradient_in_place)
    out = dict(zip(COLUMNS, out_KN, strict=True))
    shard.sum_across(out_KN[-3:])
    lse_N = out.pop("lse")
    penalised_N = out["cross_entropy"] + objective.z_loss * lse_N.square()
    scale = objective.temperature**2
    total_N = weights.cross_entropy * penalised_N + weights.divergence * scale * out["divergence"]
    return Distillation(total=total_N.sum(), gradients=gradients, **out)


def _split_chunk(
    student_CV: Tensor,
    teacher_CV: Tensor,
    label_C: Tensor,
    weights_2C: Tensor,
    objective: Objective,
    shard: Shard,
    dtype: torch.dtype,
) -> Tensor:
    """Do `kl_` over all shards; of the split of the divergence give this shard's part."""
    temperature, direction, beta = objective.temperature, objective.direction, objective.beta
    logits, reverse = (student_CV, teacher_CV), direction == "reverse"
    partials_PC = kl_partials(*logits, label_C, temperature, reverse)
    tops_2C = partials_PC[:2].clone()
    shard.max_across(tops_2C)
    sums = sums_at(partials_PC, tops_2C, temperature)
    shard.sum_across(sums)
    known = known_of(tops_2C, sums, temperature, direction)
    if direction == "jsd":
        halves_2C = jsd_partials(*logits, known.between, known.lse_hot, temperature, beta)
        shard.sum_across(halves_2C)
        known = known.with_jsd(halves_2C, beta)
    weights_3C = known.weights_3C(weights_2C, temperature, objective.z_loss)
    split_3C = kl_gradient_(
        *logits, label_C, known.rows_4C(), weights_3C, temperature, direction, beta, dtype
    )
    return known.columns(split_3C)
