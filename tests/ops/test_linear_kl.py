"""Distillation at a linear head against whole logits, log-softmax and autograd."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from megatron_mlr1.ops.head_chunks import BOTH_GRADIENTS, Chunks, Shard, Wanted, rows_in
from megatron_mlr1.ops.kl_known import COLUMNS
from megatron_mlr1.ops.kl_rows import (
    HEAD_PROBABILITY,
    jsd_partials,
    kl_,
    kl_gradient_,
    kl_partials,
)
from megatron_mlr1.ops.linear_cross_entropy import linear_cross_entropy
from megatron_mlr1.ops.linear_kl import Head, Objective, TokenWeights, linear_kl
from tests.support.softmax_losses import case, divergence, logits, value_and_gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORWARD = Objective()
DIRECTIONS = ("forward", "reverse", "jsd")


def run(inputs, objective=FORWARD, size=7, *, wanted=BOTH_GRADIENTS, shard=None, **chunks):
    weights = TokenWeights(cross_entropy=inputs.ce_weight, divergence=inputs.kd_weight)
    return linear_kl(
        Head(hidden=inputs.hidden, weight=inputs.weight),
        Head(hidden=inputs.teacher_hidden, weight=inputs.teacher_weight),
        inputs.labels,
        weights,
        objective=objective,
        shard=shard or Shard(first_id=0, num_ids=inputs.num_ids),
        chunks=Chunks(size=size, **chunks),
        wanted=wanted,
    )


def outputs(result):
    return result.total, result.gradients.hidden, result.gradients.weight


def weighted(inputs, alpha):
    return replace(
        inputs, ce_weight=(1 - alpha) * inputs.ce_weight, kd_weight=alpha * inputs.kd_weight
    )


@pytest.mark.parametrize(
    ("direction", "temperature", "alpha"), [*product(DIRECTIONS, (0.5, 1.0, 2.0), (0.0, 0.3, 1.0))]
)
def test_value_and_gradients_are_the_definitions(direction, temperature, alpha):
    inputs = weighted(case(), alpha)
    words = {"direction": direction, "temperature": temperature, "beta": 0.2, "z_loss": 0.01}
    result = run(inputs, Objective(**words))
    for got, want in zip(outputs(result), value_and_gradients(inputs, **words), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_pass_is_what_a_split_vocabulary_takes_several_for(direction):
    inputs = case(ids=3000)
    objective = Objective(direction=direction, temperature=2.0, z_loss=0.01)
    alone = Shard(first_id=0, num_ids=inputs.num_ids, max_across=lambda _: None)
    assert not alone.is_whole
    once, several = run(inputs, objective), run(inputs, objective, shard=alone)
    for name in set(COLUMNS) - {"lse"}:
        got, want = getattr(once, name), getattr(several, name)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for got, want in zip(outputs(once), outputs(several), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", [1, 7, 64, None])
def test_chunks_of_any_size_give_the_same(size, direction):
    inputs = case()
    whole = run(inputs, Objective(direction=direction), size=len(inputs.labels))
    parts = run(inputs, Objective(direction=direction), size=size)
    for got, want in zip(outputs(parts), outputs(whole), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("direction", "temperature"), [*product(DIRECTIONS, (0.5, 1.0, 2.0))])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(direction, temperature):
    inputs = case()
    inputs = replace(
        weighted(inputs, 1.0), teacher_hidden=inputs.hidden, teacher_weight=inputs.weight
    )
    result = run(inputs, Objective(direction=direction, temperature=temperature))
    assert all(value.abs().max() < 1e-13 for value in outputs(result))
    assert result.agreement.eq(1).all()


def test_numbers_for_the_log_are_their_definitions():
    inputs = case(ids=3000, padding=7)
    result = run(inputs, Objective(temperature=2.0, direction="reverse"))
    z = logits(inputs.hidden, inputs.weight, inputs.num_ids)
    t = logits(inputs.teacher_hidden, inputs.teacher_weight, inputs.num_ids)
    log_p, ce = t.log_softmax(1), torch.nn.functional.cross_entropy
    hot_p, hot_q = (t / 2).log_softmax(1), (z / 2).log_softmax(1)
    terms, is_head = hot_p.exp() * (hot_p - hot_q), hot_p.exp() >= HEAD_PROBABILITY
    assert is_head.any()
    assert not is_head.all()
    expected = {
        "cross_entropy": ce(z, inputs.labels, reduction="none"),
        "divergence": divergence(z, t, "reverse", 2.0),
        "teacher_entropy": -(log_p.exp() * log_p).sum(1),
        "teacher_cross_entropy": ce(t, inputs.labels, reduction="none"),
        "agreement": (z.argmax(1) == t.argmax(1)).double(),
        "kl_head": (terms * is_head).sum(1),
        "kl_tail": (terms * ~is_head).sum(1),
        "head_mass": (hot_p.exp() * is_head).sum(1),
    }
    for name, want in expected.items():
        torch.testing.assert_close(getattr(result, name), want, rtol=1e-11, atol=1e-12)


def test_tokens_that_are_left_out_change_nothing():
    inputs = case()
    out = (inputs.ce_weight == 0) & (inputs.kd_weight == 0)
    assert out.any()
    expected = value_and_gradients(inputs, temperature=1.0)
    for tensor in (inputs.hidden, inputs.teacher_hidden):
        tensor[out] = float("nan")
    result = run(inputs, rows=(~out).nonzero()[:, 0])
    clean = result.gradients.hidden.masked_fill(out[:, None], 0)
    for got, want in zip((result.total, clean, result.gradients.weight), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_batch_in_which_nothing_counts_is_zero():
    result = run(case(), rows=torch.empty(0, dtype=torch.int64))
    assert all(not value.any() for value in outputs(result))


def test_without_a_share_of_the_teacher_it_is_the_cross_entropy():
    inputs = weighted(case(), 0.0)
    alone = linear_cross_entropy(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        inputs.ce_weight,
        shard=Shard(first_id=0, num_ids=inputs.num_ids),
        chunks=Chunks(size=7),
    )
    # Two ops: their compiled rows sum in orders of their own.
    for got, want in zip(outputs(run(inputs)), outputs(alone), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_times_a_factor_join_what_is_there(direction):
    inputs = case()
    into = torch.ones_like(inputs.weight)
    wanted = Wanted(factor=torch.tensor(3.0, dtype=torch.float64), into=into)
    objective = Objective(direction=direction, temperature=2.0, z_loss=0.1)
    result = run(inputs, objective, wanted=wanted)
    plain = run(inputs, objective)
    assert result.gradients.weight is into
    expected = plain.total, 3 * plain.gradients.hidden, 1 + 3 * plain.gradients.weight
    for got, want in zip(outputs(result), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bf16_logits_cost_their_rounding_alone(direction):
    inputs = case(tokens=30, ids=301)
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    narrow = replace(inputs, **{name: getattr(inputs, name).bfloat16() for name in names})
    narrow = replace(narrow, ce_weight=inputs.ce_weight.float(), kd_weight=inputs.kd_weight.float())
    objective = Objective(direction=direction)
    exact, rounded = (run(narrow, objective, logits=to) for to in (None, torch.bfloat16))
    for got, want in zip(outputs(rounded), outputs(exact), strict=True):
        assert not torch.equal(got, want)
        assert (got.float() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_only_read_and_results_repeat_bit_by_bit(dtype):
    inputs = case(tokens=30, ids=301)
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    narrow = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in names})
    narrow = replace(narrow, ce_weight=inputs.ce_weight.float(), kd_weight=inputs.kd_weight.float())
    before = {name: getattr(narrow, name).clone() for name in names}
    first, second = (run(narrow, Objective(direction="jsd")) for _ in range(2))
    assert all(torch.equal(getattr(narrow, name), before[name]) for name in names)
    for a, b in zip(outputs(first), outputs(second), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_hidden_states_in_int8_are_scaled_behind_the_product():
    inputs = case()
    levels = (40 * inputs.teacher_hidden).round().clamp(-127, 127).to(torch.int8)
    scale = torch.rand(len(levels), dtype=torch.float64)
    student = Head(hidden=inputs.hidden, weight=inputs.weight)
    weights = TokenWeights(cross_entropy=inputs.ce_weight, divergence=inputs.kd_weight)
    heads = [
        Head(hidden=levels, weight=inputs.teacher_weight, scale=scale),
        Head(hidden=levels * scale[:, None], weight=inputs.teacher_weight),
    ]
    a, b = (linear_kl(student, head, inputs.labels, weights, objective=FORWARD) for head in heads)
    for got, want in zip(outputs(a), outputs(b), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def rows_and_weights(device):
    generator = torch.Generator().manual_seed(3)
    z, t = 3 * torch.randn(2, 5, 33, generator=generator)
    label = torch.tensor([0, 32, -1, 4, 4])
    lse = torch.stack([z.logsumexp(1), (z / 2).logsumexp(1), (t / 2).logsumexp(1)])
    centre = divergence(z, t, "reverse", 2.0)
    weights = torch.rand(3, 5, generator=generator)
    made = z, t, label, torch.cat([lse, centre[None]]), weights
    return [tensor.to(device) for tensor in made]


@pytest.mark.parametrize("device", DEVICES)
def test_its_rows_are_ops_that_torch_can_trace(device):
    z, t, label, rows, weights = rows_and_weights(device)
    for reverse in (False, True):
        args = (z, t, label, 2.0, reverse)
        torch.library.opcheck(torch.ops.mlr1.kl_partials.default, args)
    args = (z, t, rows[1] - rows[2], rows[1], 2.0, 0.3)
    torch.library.opcheck(torch.ops.mlr1.jsd_partials.default, args)
    for direction in DIRECTIONS:
        args = (z, t, label, rows, weights, 2.0, direction, 0.3, z.dtype)
        torch.library.opcheck(torch.ops.mlr1.kl_gradient_.default, args)
        args = (z, t, label, weights[:2], 2.0, direction, 0.3, 0.01, z.dtype)
        torch.library.opcheck(torch.ops.mlr1.kl_.default, args)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_narrow_gradient_is_the_wide_one_rounded_once(direction):
    z, t, label, rows, weights = rows_and_weights("cpu")
    wide, narrow = z.clone(), z.clone()
    args = (t, label, rows, weights, 2.0, direction, 0.3)
    parts = [
        kl_gradient_(out, *args, to) for out, to in ((wide, z.dtype), (narrow, torch.bfloat16))
    ]
    assert torch.equal(*parts)
    assert torch.equal(rows_in(narrow, torch.bfloat16), wide.bfloat16())
    wide, narrow = z.clone(), z.clone()
    args = (t, label, weights[:2], 2.0, direction, 0.3, 0.01)
    parts = [kl_(out, *args, to) for out, to in ((wide, z.dtype), (narrow, torch.bfloat16))]
    assert torch.equal(*parts)
    assert torch.equal(rows_in(narrow, torch.bfloat16), wide.bfloat16())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_narrow_logits_are_reckoned_with_in_fp32(direction):
    z, t, label, rows, weights = rows_and_weights("cpu")
    z, t = z.bfloat16(), t.bfloat16()
    wide, teacher = z.float(), t.float()
    for reverse in (False, True):
        narrow_rows = kl_partials(z, t, label, 2.0, reverse)
        assert torch.equal(narrow_rows, kl_partials(wide, teacher, label, 2.0, reverse))
    between = rows[1] - rows[2]
    narrow_rows = jsd_partials(z, t, between, rows[1], 2.0, 0.3)
    assert torch.equal(narrow_rows, jsd_partials(wide, teacher, between, rows[1], 2.0, 0.3))
    args = (label, rows, weights, 2.0, direction, 0.3)
    parts = kl_gradient_(z, t, *args, z.dtype), kl_gradient_(wide, teacher, *args, wide.dtype)
    assert torch.equal(*parts)
    assert torch.equal(z, wide.bfloat16())


def test_gradients_sum_to_zero_over_the_vocabulary():
    z, t, label, rows, weights = (
        x.double() if x.is_floating_point() else x for x in rows_and_weights("cpu")
    )
    rows = torch.stack([z.logsumexp(1), (z / 2).logsumexp(1), (t / 2).logsumexp(1), rows[3]])
    weights[0] = weights[1].masked_fill(label < 0, 0)
    for direction in DIRECTIONS:
        g = z.clone()
        if direction == "reverse":
            rows[3] = divergence(z, t, "reverse", 2.0)
        if direction == "jsd":
            rows[3] = jsd_partials(z, t, rows[1] - rows[2], rows[1], 2.0, 0.3)[1]
        kl_gradient_(g, t, label, rows, weights, 2.0, direction, 0.3, z.dtype)
        assert g.sum(1).abs().max() < 1e-13


def test_a_shard_without_ids_says_that_it_has_nothing():
    empty = torch.empty(4, 0)
    partials = kl_partials(empty, empty, torch.full((4,), -1), 1.0, False)
    assert partials[[0, 1, 11]].eq(float("-inf")).all()
    assert not partials[2:11].any()
