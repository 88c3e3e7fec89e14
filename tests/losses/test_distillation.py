"""The distillation loss of a micro-batch: weights, masks, gradients and what it reports."""

from dataclasses import replace

import pytest
import torch

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.losses.distillation import HiddenTargets, Lesson, distillation_loss
from megatron_mlr1.losses.language_model import linear_language_model_loss
from megatron_mlr1.losses.vocab_parallel import TensorParallel
from megatron_mlr1.ops.hadamard import quantise, rotate
from megatron_mlr1.ops.head_chunks import Chunks
from megatron_mlr1.ops.linear_kl import Head, Objective
from megatron_mlr1.ops.sparse_targets import SparseForm, offsets, sparse_targets
from tests.support.softmax_losses import case, logits, loss


def masks(inputs):
    return (inputs.ce_weight > 0.3).double(), (inputs.kd_weight > 0.3).double()


def run(inputs, lesson, hidden=None, weight=None, **words):
    hidden = inputs.hidden if hidden is None else hidden
    weight = inputs.weight if weight is None else weight
    words = {"teacher_weight": inputs.teacher_weight} | words
    return distillation_loss(
        Head(hidden=hidden, weight=weight),
        lesson,
        inputs.labels,
        masks(inputs)[0],
        parallel=TensorParallel(group=None, num_ids=inputs.num_ids),
        **words,
    )


def lesson_of(inputs, alpha=0.3, **objective):
    return Lesson(
        targets=HiddenTargets(hidden=inputs.teacher_hidden),
        alpha=alpha,
        mask=masks(inputs)[1],
        objective=Objective(**objective),
    )


def weighted(inputs, alpha):
    ce_mask, kd_mask = masks(inputs)
    return replace(inputs, ce_weight=(1 - alpha) * ce_mask, kd_weight=alpha * kd_mask)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunks", [None, Chunks(size=5)], ids=["counted", "all"])
def test_both_parts_are_weighed_by_alpha_and_their_own_masks(alpha, chunks):
    inputs = case()
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    lesson = lesson_of(inputs, alpha, temperature=2.0)
    done = run(inputs, lesson, hidden, weight, chunks=chunks)
    (5 * done.total).backward()
    other, head = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    expected = loss(weighted(inputs, alpha), other, head, temperature=2.0)
    (5 * expected).backward()
    torch.testing.assert_close(done.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, head.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_gradients_are_those_of_small_differences(direction):
    inputs = case(tokens=4, ids=9, padding=2, width=3, teacher_width=5)
    lesson = lesson_of(inputs, direction=direction, temperature=0.5, z_loss=0.1)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: run(inputs, lesson, hidden, weight).total,
        (inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()),
    )


@pytest.mark.parametrize("points", [0, 4])
def test_gradients_of_sparse_targets_are_those_of_small_differences(points):
    inputs = case(tokens=4, ids=9, padding=2, width=3, teacher_width=5)
    t = logits(inputs.teacher_hidden, inputs.teacher_weight, inputs.num_ids)
    form = SparseForm(top=3, points=points, temperature=2.0)
    targets = sparse_targets(t, offsets(bytes(16), 0, 0, 4), form)
    lesson = replace(lesson_of(inputs, temperature=2.0), targets=targets)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: run(inputs, lesson, hidden, weight, teacher_weight=None).total,
        (inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()),
    )


def test_the_log_has_sums_over_the_tokens_that_each_number_is_about():
    inputs = case()
    ce_mask, kd_mask = masks(inputs)
    done = run(inputs, lesson_of(inputs))
    z = logits(inputs.hidden, inputs.weight, inputs.num_ids)
    ce = torch.nn.functional.cross_entropy(z, inputs.labels, reduction="none")
    expected = torch.stack([(ce * ce_mask).sum(), ce_mask.sum()]).float()
    torch.testing.assert_close(done.report["lm loss"], expected)
    assert done.tokens == int(ce_mask.sum())
    assert done.tokens.dtype == torch.int32
    names = set(done.report) - {"lm loss"}
    assert names == {
        "kd loss",
        "teacher entropy",
        "teacher lm loss",
        "top-1 agreement",
        "kd head",
        "kd tail",
        "teacher head mass",
    }
    assert all(done.report[name][1] == kd_mask.sum() for name in names)
    parts = done.report["kd head"][0] + done.report["kd tail"][0]
    torch.testing.assert_close(parts, done.report["kd loss"][0])


def test_cross_entropy_is_logged_where_the_loss_is_the_divergence_alone():
    inputs = case()
    alone, mixed = (run(inputs, lesson_of(inputs, alpha)) for alpha in (1.0, 0.3))
    assert torch.equal(alone.report["lm loss"], mixed.report["lm loss"])


def test_a_mask_that_is_not_given_is_the_cross_entropys():
    inputs = case()
    lesson = lesson_of(inputs)
    given = run(inputs, replace(lesson, mask=masks(inputs)[0]))
    assert torch.equal(run(inputs, replace(lesson, mask=None)).total, given.total)


def test_an_evaluation_makes_no_gradients_and_has_the_same_numbers():
    inputs = case()
    hidden = inputs.hidden.clone().requires_grad_()
    trained = run(inputs, lesson_of(inputs), hidden)
    with torch.no_grad():
        evaluated = run(inputs, lesson_of(inputs), hidden)
    assert trained.total.requires_grad
    assert not evaluated.total.requires_grad
    assert all(torch.equal(evaluated.report[k], v) for k, v in trained.report.items())


def test_int8_states_and_a_folded_head_give_nearly_the_exact_loss():
    inputs = case(tokens=40, ids=500, teacher_width=256)
    levels, scale = quantise(rotate(inputs.teacher_hidden, 3))
    lesson = lesson_of(inputs, alpha=1.0)
    exact = run(inputs, lesson).report["kd loss"]
    folded = rotate(inputs.teacher_weight, 3)
    lesson = replace(lesson, targets=HiddenTargets(hidden=levels, scale=scale.double()))
    got = run(inputs, lesson, teacher_weight=folded).report["kd loss"]
    torch.testing.assert_close(got, exact, rtol=0.02, atol=0)


def test_targets_of_other_tokens_are_refused():
    inputs = case()
    lesson = lesson_of(inputs)
    short = replace(lesson, targets=HiddenTargets(hidden=inputs.teacher_hidden[1:]))
    with pytest.raises(TeacherError, match=r"\(22, 20\).*\(23, 20\)"):
        run(inputs, short)
    t = logits(inputs.teacher_hidden, inputs.teacher_weight, inputs.num_ids)
    sparse = sparse_targets(t[1:], torch.zeros(22), SparseForm(top=3, points=0))
    with pytest.raises(TeacherError, match="22 tokens"):
        run(inputs, replace(lesson, targets=sparse))


@pytest.mark.parametrize("objective", [{"temperature": 2.0}, {"direction": "jsd"}])
def test_sparse_targets_are_refused_for_what_they_were_not_made_for(objective):
    inputs = case()
    t = logits(inputs.teacher_hidden, inputs.teacher_weight, inputs.num_ids)
    targets = sparse_targets(t, torch.zeros(23), SparseForm(top=3, points=0))
    with pytest.raises(TeacherError, match="sparse targets were made"):
        run(inputs, replace(lesson_of(inputs, **objective), targets=targets))


def test_a_second_backward_gives_the_same_gradient():
    inputs = case()
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    done = linear_language_model_loss(
        hidden,
        weight,
        inputs.labels,
        masks(inputs)[0],
        parallel=TensorParallel(group=None, num_ids=inputs.num_ids),
    )
    first = torch.autograd.grad(done.total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * done.total, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-15, atol=0)
