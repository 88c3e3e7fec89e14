r"""Row arithmetic of `linear_kl`: what one chunk of logits of student and teacher goes through.

Four ops, which compiled rows may replace. On a whole vocabulary `mlr1::kl_` does all in one pass:
it reads each logit of both once, where a fast memory holds the two rows, and overwrites the
student's. On one shard of it `mlr1::kl_partials` and, for the JSD alone, `mlr1::jsd_partials` read
both rows, and `mlr1::kl_gradient_` reads both and overwrites the student's; what the shards tell
each other lies between them.

The formulas and their names stand in `linear_kl`; for types see `cross_entropy_rows`. Logits of
student and teacher have one type.
"""

from math import log

import torch
from torch import Tensor

import megatron_mlr1.ops.extension  # noqa: F401  registers the compiled rows
from megatron_mlr1.ops.cross_entropy_rows import add_at_, logit_at, statistics, top_of, widened
from megatron_mlr1.ops.head_chunks import row_blocks, rows_in
from megatron_mlr1.ops.kl_known import COLUMNS, known_of, sums_at

HEAD_PROBABILITY = 2.0**-10
"""Ids to which the teacher gives at least this much are the head of its distribution, the others
its tail. A bound and not a rank: it needs no sorting, and shards can tell without asking."""

PARTIALS = 12


def kl_partials_reference(
    student_CV: Tensor, teacher_CV: Tensor, label_C: Tensor, temperature: float, reverse: bool
) -> Tensor:
    """Define `kl_partials`."""
    out = statistics(student_CV, PARTIALS)
    out[0], out[1] = top_of(student_CV), top_of(teacher_CV)
    out[9], out[10] = logit_at(student_CV, label_C), logit_at(teacher_CV, label_C)
    if not student_CV.size(1):
        out[11] = float("-inf")
        return out
    out[11] = logit_at(student_CV, teacher_CV.argmax(1))
    for rows in row_blocks(student_CV):
        student, teacher = widened(student_CV[rows]), widened(teacher_CV[rows])
        apart = teacher - student
        student = student - out[0, rows, None]
        teacher = teacher - out[1, rows, None]
        p = teacher.exp()
        out[4, rows] = p.sum(1)
        out[8, rows] = teacher.mul(p).sum(1)
        q_hot = student.div(temperature).exp_()
        p_hot = p if temperature == 1 else teacher.div_(temperature).exp_()
        out[2, rows] = q_hot.sum(1) if temperature == 1 else student.exp_().sum(1)
        out[3, rows] = q_hot.sum(1)
        out[5, rows] = p_hot.sum(1)
        if reverse:
            out[7, rows] = q_hot.mul_(apart).sum(1).div_(-temperature)
        else:
            out[6, rows] = apart.mul_(p_hot).sum(1).div_(temperature)
    return out


@torch.library.custom_op("mlr1::kl_partials", mutates_args=())
def kl_partials(
    student_CV: Tensor, teacher_CV: Tensor, label_C: Tensor, temperature: float, reverse: bool
) -> Tensor:
    """Summarise the rows of one shard.

    Args:
        student_CV: z.
        teacher_CV: t.
        label_C: column of the label, int64; -1 where another shard has it, which counts as zero.
        temperature: T.
        reverse: whether the cross sum is the reverse divergence's.

    Returns:
        [12, C]: max z, max t; sum e^(z - max z), sum e^((z - max z) / T), the same two of t;
        sum e^((t - max t) / T) (t - z) / T (zero if reverse);
        sum e^((z - max z) / T) (z - t) / T (zero if not); sum e^(t - max t) (t - max t);
        z and t at the label; z at the first of the largest t.
    """
    return kl_partials_reference(student_CV, teacher_CV, label_C, temperature, reverse)


@kl_partials.register_fake
def _(
    student_CV: Tensor, teacher_CV: Tensor, label_C: Tensor, temperature: float, reverse: bool
) -> Tensor:
    return statistics(student_CV, PARTIALS)


def _below_mixture(gap_BV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Give log p'/m and log q'/m for log q'/p'."""
    log_p = torch.logaddexp(gap_BV + log(1 - beta), gap_BV.new_full((), log(beta))).neg_()
    return log_p, log_p + gap_BV


def jsd_partials_reference(
    student_CV: Tensor,
    teacher_CV: Tensor,
    between_C: Tensor,
    lse_C: Tensor,
    temperature: float,
    beta: float,
) -> Tensor:
    """Define `jsd_partials`."""
    out_2C = statistics(student_CV, 2)
    for rows in row_blocks(student_CV):
        student = widened(student_CV[rows])
        gap = (student - widened(teacher_CV[rows])).div_(temperature).sub_(between_C[rows, None])
        log_p, log_q = _below_mixture(gap, beta)
        q = student.div(temperature).sub_(lse_C[rows, None])
        out_2C[0, rows] = log_p.mul_((q - gap).exp_()).sum(1)
        out_2C[1, rows] = log_q.mul_(q.exp_()).sum(1)
    return out_2C


@torch.library.custom_op("mlr1::jsd_partials", mutates_args=())
def jsd_partials(
    student_CV: Tensor,
    teacher_CV: Tensor,
    between_C: Tensor,
    lse_C: Tensor,
    temperature: float,
    beta: float,
) -> Tensor:
    """Sum the two halves of the JSD over one shard: [2, C] of sum p' log p'/m, sum q' log q'/m.

    Args:
        student_CV: z.
        teacher_CV: t.
        between_C: log sum exp of z / T, less that of t / T.
        lse_C: log sum exp of z / T.
        temperature: T.
        beta: share of the teacher.
    """
    return jsd_partials_reference(student_CV, teacher_CV, between_C, lse_C, temperature, beta)


@jsd_partials.register_fake
def _(
    student_CV: Tensor,
    teacher_CV: Tensor,
    between_C: Tensor,
    lse_C: Tensor,
    temperature: float,
    beta: float,
) -> Tensor:
    return statistics(student_CV, 2)


def kl_gradient_reference(  # noqa: PLR0913  as the schema of the op has them
    student_CV: Tensor,
    teacher_CV: Tensor,
    label_C: Tensor,
    rows_4C: Tensor,
    weights_3C: Tensor,
    temperature: float,
    direction: str,
    beta: float,
    dtype: torch.dtype,
) -> Tensor:
    """Define `kl_gradient_`."""
    out_3C = statistics(student_CV, 3)
    for rows in row_blocks(student_CV):
        lse, lse_hot, teacher_lse_hot, centre = rows_4C[:, rows, None]
        pull, _, kd = weights_3C[:, rows, None]
        student, teacher = widened(student_CV[rows]), widened(teacher_CV[rows])
        log_q = (student / temperature).sub_(lse_hot)
        log_p = (teacher / temperature).sub_(teacher_lse_hot)
        p = log_p.exp()
        q = (student - lse).exp_()
        q_hot = q if temperature == 1 else log_q.exp()
        gap = log_q.sub_(log_p)
        follow = _follow(p, q_hot, gap, centre, direction, beta)
        gradient = q.mul(pull).add_(follow.mul_(kd))
        add_at_(gradient, label_C[rows], -weights_3C[1, rows])
        idle = (weights_3C[:, rows, None] == 0).all(0)
        rows_in(student_CV, dtype)[rows] = gradient.masked_fill_(idle, 0)
        is_head = p >= HEAD_PROBABILITY
        out_3C[2, rows] = p.mul(is_head).sum(1)
        terms = gap.mul_(p).neg_()
        out_3C[0, rows] = terms.mul(is_head).sum(1)
        out_3C[1, rows] = terms.masked_fill_(is_head, 0).sum(1)
    return out_3C


@torch.library.custom_op("mlr1::kl_gradient_", mutates_args=("student_CV",))
def kl_gradient_(  # noqa: PLR0913  as the schema of the op has them
    student_CV: Tensor,
    teacher_CV: Tensor,
    label_C: Tensor,
    rows_4C: Tensor,
    weights_3C: Tensor,
    temperature: float,
    direction: str,
    beta: float,
    dtype: torch.dtype,
) -> Tensor:
    """Overwrite z by pull * q - weight * e_label + kd * g, and split the forward KL.

    Args:
        student_CV: z of one shard, overwritten.
        teacher_CV: t.
        label_C: column of the label; -1 where another shard has it.
        rows_4C: log sum exp of z, of z / T and of t / T over the whole vocabulary, and what g
            takes off: D (reverse) or KL(q' || m) (jsd).
        weights_3C: pull, weight, kd = w_kd T; where all are 0, the gradient is zeros, whatever the
            logits are.
        temperature: T.
        direction: of `Objective`.
        beta: of `Objective`.
        dtype: of the gradient.

    Returns:
        [3, C] over this shard: KL(p' || q') of the head, of the tail; probability of the head.
    """
    return kl_gradient_reference(
        student_CV, teacher_CV, label_C, rows_4C, weights_3C, temperature, direction, beta, dtype
    )


def _follow(
    p: Tensor, q: Tensor, gap: Tensor, centre: Tensor, direction: str, beta: float
) -> Tensor:
    """Give g of a block as a new tensor; `gap` is log q' - log p'."""
    if direction == "forward":
        return q - p
    if direction == "reverse":
        return (gap - centre).mul_(q)
    return _below_mixture(gap, beta)[1].sub_(centre).mul_(q).mul_(1 - beta)


@kl_gradient_.register_fake
def _(  # noqa: PLR0913  as the schema of the op has them
    student_CV: Tensor,
    teacher_CV: Tensor,
    label_C: Tensor,
    rows_4C: Tensor,
    weights_3C: Tensor,
    temperature: float,
    direction: str,
    beta: float,
    dtype: torch.dtype,
) -> Tensor:
    return statistics(student_CV, 3)


def kl_reference(  # noqa: PLR0913  as the schema of the op has them
    student_CV: Tensor,
    teacher_CV: Tensor,
    label_C: Tensor,
    weights_2C: Tensor,
    temperature: float,
    direction: str,
    beta: float,
    z_loss: float,
    dtype: torch.dtype,
) -> Tensor:
    """Define `kl_` by what a split vocabulary goes through."""
    logits, reverse = (student_CV, teacher_CV), direction == "reverse"
    partials_PC = kl_partials_reference(*logits, label_C, temperature, reverse)
    tops_2C = partials_PC[:2]
    known = known_of(tops_2C, sums_at(partials_PC, tops_2C, temperature), temperature, direction)
    if direction == "jsd":
        halves_2C = jsd_partials_reference(*logits, known.between, known.lse_hot, temperature, beta)
        known = known.with_jsd(halves_2C, beta)
    weights_3C = known.weights_3C(weights_2C, temperature, z_loss)
    split_3C = kl_gradient_reference(
        *logits, label_C, known.rows_4C(), weights_3C, temperature, direction, beta, dtype
    )
    return known.columns(split_3C)


@torch.library.custom_op("mlr1::kl_", mutates_args=("student_CV",))
def kl_(  # noqa: PLR0913  as the schema of the op has them
    student_CV: Tensor,
    teacher_CV: Tensor,
    label_C: Tensor,
    weights_2C: Tensor,
    temperature: float,
    direction: str,
    beta: float,
    z_loss: float,
    dtype: torch.dtype,
) -> Tensor:
    """Overwrite z by w_ce [q (1 + 2 zeta lse) - e_label] + w_kd T g, in one pass.

    Args:
        student_CV: z over the whole vocabulary, overwritten.
        teacher_CV: t.
        label_C: column of the label; -1 for none, which counts as zero.
        weights_2C: w_ce and w_kd; where both are 0, the gradient is zeros, whatever the logits are.
        temperature: T.
        direction: of `Objective`.
        beta: of `Objective`.
        z_loss: zeta of `Objective`.
        dtype: of the gradient.

    Returns:
        [9, C]: `kl_known.COLUMNS`.
    """
    return kl_reference(
        student_CV,
        teacher_CV,
        label_C,
        weights_2C,
        temperature,
        direction,
        beta,
        z_loss,
        dtype,
    )


@kl_.register_fake
def _(  # noqa: PLR0913  as the schema of the op has them
    student_CV: Tensor,
    teacher_CV: Tensor,
    label_C: Tensor,
    weights_2C: Tensor,
    temperature: float,
    direction: str,
    beta: float,
    z_loss: float,
    dtype: torch.dtype,
) -> Tensor:
    return statistics(student_CV, len(COLUMNS))
