"""The rows of `linear_sparse_kl`, compiled ones where they are built, against the definition."""

from itertools import product

import pytest
import torch

from megatron_mlr1.ops.extension import has_row
from megatron_mlr1.ops.sparse_kl_rows import (
    sparse_kl_gradient_,
    sparse_kl_gradient_reference,
    sparse_kl_partials,
    sparse_kl_partials_reference,
)
from tests.support.logit_rows import (
    PAIRS,
    assert_gradient,
    assert_sums,
    log_sums,
    of_rows,
    pair,
    target,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (7, 30), (1024, 5), (5003, 700), (9, 0)]
"""Ids of a row, and of a target."""

WAYS = [*product((1.0, 2.0), (False, True))]
"""Temperature, and whether the others are a bucket."""


def partials_of(logits, label, column, weight, device, temperature, bucket):
    """What the op and the definition in fp64 give."""
    arguments = [tensor.to(device) for tensor in (logits, label, column, weight)]
    actual = sparse_kl_partials(*arguments, temperature, bucket).cpu()
    wide = logits.double(), label, column, weight.double()
    return actual, sparse_kl_partials_reference(*wide, temperature, bucket)


def gradients_of(logits, label, column, weight, device, dtype, temperature, bucket):
    """Logits overwritten by the op, and by the definition in fp64."""
    sums = log_sums(logits, logits, label, temperature)[:2]
    outside = of_rows(1, len(logits), logits.dtype) if bucket else torch.ones_like(sums[:1])
    numbers = torch.cat((sums, outside))
    factors = of_rows(3, len(logits), logits.dtype, seed=2)
    place, wide = logits.clone().to(device), logits.double()
    others = [each.to(device) for each in (label, column, weight, numbers, factors)]
    sparse_kl_gradient_(place, *others, temperature, bucket, dtype)
    others = label, column, weight.double(), numbers.double(), factors.double()
    sparse_kl_gradient_reference(wide, *others, temperature, bucket, torch.float64)
    return place.cpu(), wide


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("temperature", "bucket"), WAYS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("width", "named"), SHAPES)
def test_sums_are_the_definitions(width, named, dtype, temperature, bucket, device):
    logits, _, label = pair(5, width, dtype)
    column, weight = target(5, width, named, dtype)
    arguments = (logits, label, column, weight, device, temperature, bucket)
    assert_sums(*partials_of(*arguments), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("temperature", "bucket"), WAYS)
@pytest.mark.parametrize(("dtype", "narrow"), PAIRS, ids=str)
@pytest.mark.parametrize(("width", "named"), SHAPES)
def test_the_gradient_is_the_definitions(width, named, dtype, narrow, temperature, bucket, device):
    logits, _, label = pair(5, width, dtype)
    column, weight = target(5, width, named, dtype)
    arguments = (logits, label, column, weight, device, narrow, temperature, bucket)
    assert_gradient(*gradients_of(*arguments), narrow)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bucket", [False, True])
def test_an_id_that_comes_twice_and_is_the_label_counts_each_time(bucket, device):
    logits, _, label = pair(2, 50, torch.float64)
    label[:] = torch.tensor([3, 4])
    column = torch.tensor([[3, 7, 3, -1, 3], [4, 0, 0, -1, 49]])
    weight = torch.rand(2, 5, dtype=torch.float64)
    arguments = (logits, label, column, weight, device)
    assert_sums(*partials_of(*arguments, 2.0, bucket), torch.float64)
    assert_gradient(*gradients_of(*arguments, torch.float64, 2.0, bucket), torch.float64)


@pytest.mark.parametrize("device", DEVICES)
def test_the_others_keep_their_digits_where_the_named_ids_have_almost_all(device):
    logits = torch.full((1, 3000), -40.0)
    logits[0, (5, 2999)] = 40.0
    column = torch.tensor([[2999, 5]])
    arguments = (logits, torch.tensor([5]), column, torch.rand(1, 2), device, 1.0, True)
    actual, expected = partials_of(*arguments)
    assert 0 < expected[3] < 1e-30
    torch.testing.assert_close(actual[3].double(), expected[3], rtol=2e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_huge_logits_and_missing_ones_count_as_in_the_definition(device):
    logits, _, label = pair(4, 2500, torch.float32)
    logits[0, 3:] += 1e4
    logits[1, 5], logits[2, 7] = 1e4, float("-inf")
    logits[3] = float("-inf")
    column, weight = target(4, 2500, 6, torch.float32)
    arguments = (logits, label, column, weight, device, 2.0, True)
    actual, expected = partials_of(*arguments)
    assert expected[:, :3].isfinite().all()
    assert expected[1:4, 3].isnan().all()
    assert_sums(actual, expected, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(4, 0), (0, 9)], ids=str)
def test_without_ids_or_tokens_it_gives_what_the_definition_gives(shape, device):
    logits, _, label = pair(*shape, torch.float32)
    label.fill_(-1)
    column = torch.full((shape[0], 3), -1)
    weight, rows = torch.rand(shape[0], 3), torch.rand(3, shape[0])
    arguments = (logits, label, column, weight, device, 2.0, True)
    actual, expected = partials_of(*arguments)
    assert torch.equal(actual.double(), expected)
    moved = [each.to(device) for each in (logits, label, column, weight, rows, rows)]
    sparse_kl_gradient_(*moved, 2.0, True, torch.float32)
    assert moved[0].shape == shape


def test_the_number_of_threads_changes_no_bit():
    logits, _, label = pair(9, 20_011, torch.float32)
    given = (logits, label, *target(9, 20_011, 300, torch.float32), "cpu")

    def once():
        place, _ = gradients_of(*given, torch.bfloat16, 2.0, True)
        return partials_of(*given, 2.0, True)[0], place.view(torch.int32)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = once()
        torch.set_num_threads(3)
        together = once()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.gpu
@pytest.mark.ext
@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_runs_on_a_gpu_give_equal_bits(dtype, bucket):
    logits, _, label = pair(64, 128_256, torch.float32)
    numbers = log_sums(logits, logits, label, 2.0)
    given = (label, *target(64, 128_256, 300, torch.float32))
    logits, numbers, *given = (each.cuda() for each in (logits, numbers, *given))
    factors = of_rows(3, 64, torch.float32).cuda()

    def once():
        place = logits.clone()
        sparse_kl_gradient_(place, *given, numbers, factors, 2.0, bucket, dtype)
        return sparse_kl_partials(logits, *given, 2.0, bucket), place.view(torch.int32)

    first = once()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.ext
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_rows_take_the_place_of_the_definitions(device):
    for op in ("sparse_kl_partials", "sparse_kl_gradient_"):
        assert has_row(f"mlr1::{op}", device.upper())
