r"""The distillation loss of one micro-batch:

    L = sum over tokens of  loss_mask (1 - alpha) CE  +  kd_mask alpha T^2 D

with D the divergence from the teacher (`ops.linear_kl`), which may come as hidden states (exact)
or as sparse targets. Cross-entropy and divergence come from one pass over the logits.
"""

from dataclasses import dataclass, field
from math import log

import torch
from torch import Tensor
from torch.nn import functional

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.losses.language_model import MicroBatchLoss, counted_rows
from megatron_mlr1.losses.vocab_parallel import (
    Deliver,
    Foreseen,
    TensorParallel,
    add_to_grad,
    wanted,
    with_gradients,
)
from megatron_mlr1.ops.head_chunks import Chunks, HeadGradients, Wanted
from megatron_mlr1.ops.libraries import LEFT_OUT, liger_divergence
from megatron_mlr1.ops.linear_kl import Head, Objective, TokenWeights, linear_kl
from megatron_mlr1.ops.linear_sparse_kl import linear_sparse_kl
from megatron_mlr1.ops.sparse_targets import SparseTargets
from megatron_mlr1.ops.wide_matmul import wide_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenTargets:
    """The teacher's hidden states behind its last norm, in the layout of the student's."""

    hidden: Tensor
    """[..., D of the teacher] in the type of the teacher's head, or int8, rotated as it is."""

    scale: Tensor | None = None
    """[...] fp32: factor of each token of an int8 `hidden`."""


TeacherTargets = HiddenTargets | SparseTargets
"""What a teacher says about the tokens of a micro-batch, in the order of the student's hidden
states. If sequences are split over the tensor-parallel group, hidden states are this process's
part; sparse targets, which are small, are whole on every process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """The teacher's part in one micro-batch."""

    targets: TeacherTargets

    alpha: float
    """Share of the divergence, 0 to 1; the cross-entropy has the rest."""

    mask: Tensor | None = None
    """1 where a token is distilled and 0 where not, like the labels; None: where it counts."""

    objective: Objective = field(default_factory=Objective)


def distillation_loss(
    student: Head,
    lesson: Lesson,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    teacher_weight: Tensor | None,
    parallel: TensorParallel,
    chunks: Chunks | None = None,
    deliver: Deliver | Foreseen = add_to_grad,
) -> MicroBatchLoss:
    """Compute both heads and the loss together, without a tensor of tokens x vocabulary.

    Args:
        student: hidden states [..., D], this process's part, and its rows of the head.
        lesson: targets, alpha, mask, divergence.
        labels: ids, as many elements as there are tokens in all parts, in the same order.
        loss_mask: 1 where a token counts for the cross-entropy and 0 where not, like `labels`.
        teacher_weight: the teacher's rows of the same ids; None where targets are sparse.
        parallel: how both heads are split.
        chunks: which tokens take part, and their logits; None leaves out those that no mask
            counts, for which it waits for the device once.
        deliver: what becomes of the student's head's gradient.

    Returns:
        a report of "lm loss" and "kd loss" (D alone, in nats); of hidden targets also "teacher
        entropy", "teacher lm loss", "top-1 agreement", "kd head", "kd tail" (parts of the forward
        divergence, see `kl_rows.HEAD_PROBABILITY`) and "teacher head mass"; each over the tokens
        that are distilled, but "lm loss" over those that count.

    Raises:
        TeacherError: the targets do not fit the tokens, or sparse ones the temperature.
    """
    dtype = wide_dtype(student.weight.dtype)
    ce_mask = loss_mask.reshape(-1).to(dtype)
    kd_mask = ce_mask if lesson.mask is None else lesson.mask.reshape(-1).to(dtype)
    hidden = parallel.gathered(student.hidden.detach()).reshape(-1, student.hidden.size(-1))
    head = Head(hidden=hidden, weight=student.weight.detach())
    weights = TokenWeights(
        cross_entropy=ce_mask * (1 - lesson.alpha), divergence=kd_mask * lesson.alpha
    )
    work = _Work(
        head=head,
        labels=labels.reshape(-1),
        weights=weights,
        chunks=chunks or Chunks(rows=counted_rows(ce_mask, kd_mask)),
        parallel=parallel,
        wanted=wanted(student.hidden, student.weight, deliver),
    )
    if isinstance(lesson.targets, SparseTargets):
        result = _sparse(work, lesson.targets, lesson.objective)
    else:
        assert teacher_weight is not None, "hidden states need the teacher's head"
        result = _dense(work, lesson.targets, lesson.objective, teacher_weight)
    total = with_gradients(
        result.total, student.hidden, student.weight, result.gradients, parallel, deliver
    )
    tokens, distilled = ce_mask.sum(), kd_mask.sum()
    report = {"lm loss": torch.stack(((result.cross_entropy * ce_mask).sum(), tokens)).float()}
    for name, column_N in result.columns.items():
        report[name] = torch.stack(((column_N * kd_mask).sum(), distilled)).float()
    return MicroBatchLoss(total=total, tokens=tokens.to(torch.int), report=report)


def divergence_loss(
    alone: MicroBatchLoss,
    student: Head,
    lesson: Lesson,
    loss_mask: Tensor,
    *,
    teacher_weight: Tensor,
    num_ids: int,
    kernel: str,
) -> MicroBatchLoss:
    """Add a divergence that another implementation computes to a cross-entropy.

    Args:
        alone: the cross-entropy's part, of any implementation, not weighted.
        student: hidden states [..., D] and the whole head; autograd gives their gradients.
        lesson: with hidden targets.
        loss_mask: 1 where a token counts for the cross-entropy and 0 where not.
        teacher_weight: the teacher's whole head.
        num_ids: ids of both.
        kernel: "reference", the definition over tensors of all logits, or "liger".

    Returns:
        a report of "lm loss" and "kd loss".

    Raises:
        TeacherError: the targets do not fit the tokens.
    """
    targets, objective = lesson.targets, lesson.objective
    assert isinstance(targets, HiddenTargets), "sparse targets are refused at the start"
    hidden = student.hidden.reshape(-1, student.hidden.size(-1))
    states = targets.hidden.reshape(-1, targets.hidden.size(-1))
    _refuse_other_states(states, hidden.size(0), teacher_weight)
    if targets.scale is not None:
        states = states * targets.scale.reshape(-1, 1)
    mask = (loss_mask if lesson.mask is None else lesson.mask).reshape(-1)
    function = liger_divergence if kernel == "liger" else logits_divergence
    total = function(
        (hidden, student.weight[:num_ids]),
        (states.to(teacher_weight.dtype), teacher_weight[:num_ids]),
        torch.zeros_like(mask, dtype=torch.int64).masked_fill(mask == 0, LEFT_OUT),
        direction=objective.direction,
        temperature=objective.temperature,
        beta=objective.beta,
    )
    told = torch.stack((total.detach(), mask.sum().to(total.dtype))).float()
    scale = objective.temperature**2
    return MicroBatchLoss(
        total=(1 - lesson.alpha) * alone.total + lesson.alpha * scale * total,
        tokens=alone.tokens,
        report=alone.report | {"kd loss": told},
    )


def logits_divergence(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    labels_N: Tensor,
    *,
    direction: str,
    temperature: float,
    beta: float,
) -> Tensor:
    """Sum the divergence by its definition, over tensors of all logits; see `liger_divergence`."""
    wide = wide_dtype(student[1].dtype)
    z, t = (functional.linear(*head).to(wide) / temperature for head in (student, teacher))
    log_q, log_p = z.log_softmax(1), t.log_softmax(1)
    if direction == "forward":
        terms = log_p.exp() * (log_p - log_q)
    elif direction == "reverse":
        terms = log_q.exp() * (log_q - log_p)
    else:
        log_m = torch.logaddexp(log_p + log(beta), log_q + log(1 - beta))
        terms = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    # Not by index: how many tokens are left is known on the device alone.
    return terms.sum(1).masked_fill(labels_N == LEFT_OUT, 0).sum()


def _refuse_other_states(states: Tensor, num_tokens: int, teacher_weight: Tensor) -> None:
    width = teacher_weight.size(1)
    if states.shape != (num_tokens, width):
        raise TeacherError(
            f"The teacher's hidden states are {tuple(states.shape)}; these tokens and its head "
            f"need ({num_tokens}, {width}). Check that teacher and head belong together."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What both kinds of targets are judged with."""

    head: Head
    labels: Tensor
    weights: TokenWeights
    chunks: Chunks
    parallel: TensorParallel
    wanted: Wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    total: Tensor
    gradients: HeadGradients
    cross_entropy: Tensor
    columns: dict[str, Tensor]


def _dense(
    work: _Work, targets: HiddenTargets, objective: Objective, teacher_weight: Tensor
) -> _Result:
    hidden = work.parallel.gathered(targets.hidden).reshape(-1, targets.hidden.size(-1))
    _refuse_other_states(hidden, work.labels.numel(), teacher_weight)
    scale = targets.scale
    if scale is not None:
        scale = work.parallel.gathered(scale).reshape(-1)
    result = linear_kl(
        work.head,
        Head(hidden=hidden, weight=teacher_weight, scale=scale),
        work.labels,
        work.weights,
        objective=objective,
        shard=work.parallel.shard(work.head.weight.size(0)),
        chunks=work.chunks,
        wanted=work.wanted,
    )
    return _Result(
        total=result.total,
        gradients=result.gradients,
        cross_entropy=result.cross_entropy,
        columns={
            "kd loss": result.divergence,
            "teacher entropy": result.teacher_entropy,
            "teacher lm loss": result.teacher_cross_entropy,
            "top-1 agreement": result.agreement,
            "kd head": result.kl_head,
            "kd tail": result.kl_tail,
            "teacher head mass": result.head_mass,
        },
    )


def _sparse(work: _Work, targets: SparseTargets, objective: Objective) -> _Result:
    if targets.ids.size(0) != work.labels.numel():
        raise TeacherError(
            f"There are sparse targets for {targets.ids.size(0)} tokens; this micro-batch has "
            f"{work.labels.numel()}. Check that targets and data belong together."
        )
    if targets.form.temperature != objective.temperature or objective.direction != "forward":
        raise TeacherError(
            f"The sparse targets were made for the forward divergence at temperature "
            f"{targets.form.temperature}; the objective is {objective.direction} at "
            f"{objective.temperature}. Take the targets' own, or hidden states, which serve any."
        )
    result = linear_sparse_kl(
        work.head,
        targets,
        work.labels,
        work.weights,
        z_loss=objective.z_loss,
        shard=work.parallel.shard(work.head.weight.size(0)),
        chunks=work.chunks,
        wanted=work.wanted,
    )
    return _Result(
        total=result.total,
        gradients=result.gradients,
        cross_entropy=result.cross_entropy,
        columns={"kd loss": result.divergence},
    )
