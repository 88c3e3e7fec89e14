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

`kl_rows` has the row arithmetic, `head_chunks` the loop. A split vocabulary exchanges two maxima
and ten sums a token and chunk, and for the JSD two sums more.
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
from megatron_mlr1.ops.kl_rows import jsd_partials, kl_gradient_, kl_partials
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
    out = {name: torch.zeros_like(weights.cross_entropy) for name in (*COLUMNS, "total")}

    def gradient_in_place(student_CV: Tensor, place: Tensor | slice, dtype: torch.dtype) -> None:
        teacher_cv = teacher_CV[: student_CV.size(0)]
        teacher.logits_into(teacher_cv, place)
        rows = TokenWeights(
            cross_entropy=weights.cross_entropy[place], divergence=weights.divergence[place]
        )
        label_C = shard.local(labels_N[place])
        columns = _one_chunk(student_CV, teacher_cv, label_C, rows, objective, shard, wanted, dtype)
        for name, column_C in columns.items():
            out[name][place] = column_C

    chunks = replace(chunks, size=size)
    gradients = run_chunks(student.hidden, student.weight, shard, chunks, wanted, gradient_in_place)
    parts_3N = torch.stack([out.pop(name) for name in ("kl_head", "kl_tail", "head_mass")])
    shard.sum_across(parts_3N)
    return Distillation(
        total=out.pop("total").sum(),
        gradients=gradients,
        kl_head=parts_3N[0],
        kl_tail=parts_3N[1],
        head_mass=parts_3N[2],
        **out,
    )


COLUMNS = (
    "cross_entropy",
    "divergence",
    "teacher_entropy",
    "teacher_cross_entropy",
    "agreement",
    "kl_head",
    "kl_tail",
    "head_mass",
)


def _one_chunk(
    student_CV: Tensor,
    teacher_CV: Tensor,
    label_C: Tensor,
    weights: TokenWeights,
    objective: Objective,
    shard: Shard,
    wanted: Wanted,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Overwrite the student's logits by the loss's gradient; give the chunk's numbers by name."""
    temperature, direction = objective.temperature, objective.direction
    partials_PC = kl_partials(student_CV, teacher_CV, label_C, temperature, direction == "reverse")
    rows = _merged(partials_PC, temperature, shard)
    lse_C, lse_hot_C, teacher_lse_hot_C = rows["lse"], rows["lse_hot"], rows["teacher_lse_hot"]
    between_C = lse_hot_C - teacher_lse_hot_C
    centre_C = divergence_C = rows["cross"] + (-between_C if direction == "reverse" else between_C)
    if direction == "jsd":
        parts_2C = jsd_partials(
            student_CV, teacher_CV, between_C, lse_hot_C, temperature, objective.beta
        )
        shard.sum_across(parts_2C)
        centre_C = parts_2C[1]
        divergence_C = objective.beta * parts_2C[0] + (1 - objective.beta) * parts_2C[1]
    cross_entropy_C = lse_C - rows["label"]
    z_loss = objective.z_loss
    parts_3C = kl_gradient_(
        student_CV,
        teacher_CV,
        label_C,
        torch.stack((lse_C, lse_hot_C, teacher_lse_hot_C, centre_C)),
        wanted.weighted(
            torch.stack(
                (
                    weights.cross_entropy * (1 + 2 * z_loss * lse_C),
                    weights.cross_entropy,
                    weights.divergence * temperature,
                )
            )
        ),
        temperature,
        direction,
        objective.beta,
        dtype,
    )
    penalised_C = cross_entropy_C + z_loss * lse_C.square()
    total_C = weights.cross_entropy * penalised_C
    return {
        "total": total_C + weights.divergence * temperature**2 * divergence_C,
        "cross_entropy": cross_entropy_C,
        "divergence": divergence_C,
        "teacher_entropy": rows["teacher_lse"] - rows["teacher_mean"],
        "teacher_cross_entropy": rows["teacher_lse"] - rows["teacher_label"],
        "agreement": rows["agreement"],
        "kl_head": parts_3C[0],
        "kl_tail": parts_3C[1],
        "head_mass": parts_3C[2],
    }


def _merged(partials_PC: Tensor, temperature: float, shard: Shard) -> dict[str, Tensor]:
    """Make rows over the whole vocabulary, [C] each, of all shards' `kl_partials`."""
    tops_2C = partials_PC[:2].clone()
    shard.max_across(tops_2C)
    # -inf in a shard without ids: what it would scale is zero there.
    shift_S, shift_T = (partials_PC[:2] - tops_2C).clamp(min=-1e30)
    hot_S, hot_T = (shift_S / temperature).exp(), (shift_T / temperature).exp()
    q, q_hot, p, p_hot, cross_p, cross_q, spread, label, teacher_label, at_top = partials_PC[2:]
    first = (shift_T == 0) & (at_top == tops_2C[0])
    sums = torch.stack(
        (
            q * shift_S.exp(),
            q_hot * hot_S,
            p * shift_T.exp(),
            p_hot * hot_T,
            cross_p * hot_T,
            cross_q * hot_S,
            (spread + shift_T * p) * shift_T.exp(),
            label,
            teacher_label,
            first.to(label.dtype),
        )
    )
    shard.sum_across(sums)
    q, q_hot, p, p_hot, cross_p, cross_q, spread, label, teacher_label, firsts = sums
    return {
        "lse": tops_2C[0] + q.log(),
        "lse_hot": tops_2C[0] / temperature + q_hot.log(),
        "teacher_lse": tops_2C[1] + p.log(),
        "teacher_lse_hot": tops_2C[1] / temperature + p_hot.log(),
        "cross": cross_p / p_hot + cross_q / q_hot,
        "teacher_mean": tops_2C[1] + spread / p,
        "label": label,
        "teacher_label": teacher_label,
        "agreement": firsts.clamp(max=1),
    }
