"""Sparse targets have the right ids, the right mean and little spread, wherever they are made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mlr1.ops.hadamard import quantise
from megatron_mlr1.ops.linear_kl import Head
from megatron_mlr1.ops.sparse_targets import (
    SparseForm,
    offsets,
    sparse_targets,
    sparse_targets_of_head,
)

ROOT = Path(__file__).parents[2]
KEY = bytes(range(16))
FORMS = {
    "top_k": SparseForm(top=6, points=0, temperature=2.0),
    "hybrid": SparseForm(top=4, points=5, temperature=2.0),
    "systematic": SparseForm(top=0, points=9),
}


def logits(rows=7, ids=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, ids, generator=generator, dtype=torch.float64)


def dense(targets, ids):
    """[N, V]: what each id has of the target."""
    out = torch.zeros(len(targets.ids), ids, dtype=targets.weights.dtype)
    return out.scatter_add_(1, targets.ids, targets.weights)


def test_a_tail_bucket_has_the_likeliest_ids_and_the_mass_of_the_rest():
    z, form = logits(), FORMS["top_k"]
    p = (z / 2).softmax(1)
    targets = sparse_targets(z, torch.zeros(7), form)
    top, ids = p.topk(6)
    assert torch.equal(targets.ids, ids)
    torch.testing.assert_close(targets.weights, top)
    rest = 1 - top.sum(1)
    torch.testing.assert_close(targets.tail, rest)
    events = torch.cat([top, rest[:, None]], 1)
    torch.testing.assert_close(targets.entropy, -(events * events.log()).sum(1))


@pytest.mark.parametrize("name", ["hybrid", "systematic"])
def test_sampled_weights_sum_to_one_and_the_likeliest_are_exact(name):
    z, form = logits(), FORMS[name]
    p = (z / form.temperature).softmax(1)
    targets = sparse_targets(z, offsets(KEY, 0, 0, 7), form)
    torch.testing.assert_close(targets.weights.sum(1), torch.ones(7, dtype=torch.float64))
    assert not targets.tail.any()
    torch.testing.assert_close(targets.entropy, -(p * p.log()).sum(1))
    exact = p.topk(form.top).values
    torch.testing.assert_close(targets.weights[:, : form.top], exact)
    top, sampled = targets.ids[:, : form.top], targets.ids[:, form.top :]
    assert not (top[:, :, None] == sampled[:, None, :]).any()


@pytest.mark.parametrize("name", ["hybrid", "systematic"])
def test_the_mean_of_many_draws_is_the_teacher(name):
    draws, form = 100_000, FORMS[name]
    z = logits(rows=1)
    p = (z / form.temperature).softmax(1)[0]
    targets = sparse_targets(z.expand(draws, -1), offsets(KEY, 0, 0, draws), form)
    weights = dense(targets, 40)
    error = weights.std(0) / draws**0.5
    assert ((weights.mean(0) - p).abs() <= 5 * error + 1e-12).all()


def test_systematic_draws_spread_no_more_than_independent_ones():
    draws, form = 20_000, FORMS["systematic"]
    z = logits(rows=1)
    p = z.softmax(1)[0]
    targets = sparse_targets(z.expand(draws, -1), offsets(KEY, 0, 0, draws), form)
    weights = dense(targets, 40)
    counts = weights * form.points
    expected = p * form.points
    assert ((counts - expected).abs() < 1 + 1e-9).all(), "neither rounded down nor up"
    independent = p * (1 - p) / form.points
    noise = (expected.frac() * (1 - expected.frac()) / draws).sqrt() / form.points**2
    assert (weights.var(0) <= independent + 5 * noise).all()
    assert weights.var(0).sum() < independent.sum() / 2


def test_all_ids_kept_are_the_teacher_itself():
    z = logits()
    targets = sparse_targets(z, offsets(KEY, 0, 0, 7), SparseForm(top=40, points=3))
    torch.testing.assert_close(dense(targets, 40), z.softmax(1))


def test_points_at_the_ends_fall_on_ids_that_are_possible():
    z = torch.full((2, 5), float("-inf"), dtype=torch.float64)
    z[:, 1] = z[:, 3] = 0
    largest = torch.tensor([1 - 2**-53, 0.0], dtype=torch.float64)
    form = SparseForm(top=0, points=4)
    assert sparse_targets(z, largest, form).ids.tolist() == [[1, 3, 3, 3], [1, 1, 3, 3]]


def test_offsets_depend_on_key_seed_and_place_alone():
    whole = offsets(KEY, 3, 0, 50)
    assert whole.dtype == torch.float64
    assert ((whole >= 0) & (whole < 1)).all()
    for first in (1, 4, 7, 13):
        assert torch.equal(offsets(KEY, 3, first, 50 - first), whole[first:])
    others = [offsets(KEY, 4, 0, 50), offsets(KEY[::-1], 3, 0, 50)]
    assert all((other != whole).all() for other in others)
    assert abs(offsets(KEY, 0, 0, 100_000).mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5


def test_another_process_makes_the_same_targets():
    code = (
        "from megatron_mlr1.ops.sparse_targets import offsets;"
        "print(offsets(bytes(range(16)), 9, 5, 6).tolist())"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == offsets(KEY, 9, 5, 6).tolist()


@pytest.mark.parametrize("name", FORMS)
def test_targets_of_a_head_are_those_of_its_logits_in_chunks_of_any_size(name):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(11, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    offset, form = offsets(KEY, 1, 0, 11), FORMS[name]
    expected = sparse_targets(hidden @ weight.T, offset, form)
    for tokens in (3, None):
        head = Head(hidden=hidden, weight=weight)
        got = sparse_targets_of_head(head, offset, form, tokens_at_once=tokens)
        assert torch.equal(got.ids, expected.ids)
        for field in ("weights", "tail", "entropy"):
            torch.testing.assert_close(getattr(got, field), getattr(expected, field))


def test_targets_of_a_bf16_head_and_of_int8_states_are_fp32():
    hidden, weight = torch.randn(4, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    levels, scale = quantise(hidden)
    for head in (
        Head(hidden=hidden, weight=weight),
        Head(hidden=levels, weight=weight, scale=scale),
    ):
        targets = sparse_targets_of_head(head, offsets(KEY, 0, 0, 4), FORMS["hybrid"])
        assert targets.weights.dtype == torch.float32
        assert targets.ids.dtype == torch.int64


def test_a_key_of_another_length_is_refused():
    with pytest.raises(AssertionError, match="16 bytes"):
        offsets(b"short", 0, 0, 1)
