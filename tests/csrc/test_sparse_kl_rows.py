"""csrc/sparse_kl_rows.cu, run whole on a CPU, against the definition in fp64."""

from itertools import product

import pytest
import torch

from megatron_mlr1.ops.sparse_kl_rows import (
    sparse_kl_gradient_reference,
    sparse_kl_partials_reference,
)
from tests.csrc.devices import H200, displaced, strided
from tests.support.logit_rows import (
    PAIRS,
    assert_gradient,
    assert_sums,
    log_sums,
    of_rows,
    pair,
    target,
)

# Rows of many tiles, and of few ids; 700 ids of a target are more than a block has threads. Odd
# rows are moved one by one, the others in vectors.
CASES = [(2, 20_504, 700), (3, 16, 9), (2, 10_301, 700), (3, 5, 9), (3, 5, 0)]
VOCABULARY = (3, 128_256, 64)
WAYS = [*product((1.0, 2.0), (False, True))]
"""Temperature, and whether the others are a bucket."""

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def host(host_code):
    return host_code("sparse_kl_rows")


def sums(host, given, temperature, bucket, order=0):
    """Run the op, compare it with the definition in fp64."""
    run = host.run(H200, "sparse_kl_partials", *given, temperature, bucket, order=order)
    logits, label, column, weight = given
    wide = logits.double(), label, column, weight.double()
    expected = sparse_kl_partials_reference(*wide, temperature, bucket)
    assert_sums(run.result, expected, logits.dtype)
    return run


def given_of(case, dtype):
    """Logits, labels, columns and weights of a target."""
    rows, width, named = case
    logits, _, label = pair(rows, width, dtype)
    return (logits, label, *target(rows, width, named, dtype))


def gradient(host, given, narrow, temperature, bucket, order=0):
    """Run the op, compare what stands in the place of logits with the definition in fp64."""
    logits, label, column, weight = given
    if column.size(1):
        label[-1] = column[-1, 0].clamp(min=0)
    rows, dtype = logits.size(0), logits.dtype
    log_sum = log_sums(logits, logits, label, temperature)[:2]
    numbers = torch.cat((log_sum, of_rows(1, rows, dtype)))
    factors = of_rows(3, rows, dtype, seed=2)
    factors[:, 1:][:, :1] = 0  # a masked row
    words = (*given, numbers, factors, temperature, bucket, narrow)
    run = host.run(H200, "sparse_kl_gradient_", *words, order=order)
    wide, others = logits.double(), (label, column, weight.double(), numbers.double())
    sparse_kl_gradient_reference(
        wide, *others, factors.double(), temperature, bucket, torch.float64
    )
    assert_gradient(run.arguments[0], wide, narrow)
    return run


@pytest.mark.parametrize(("temperature", "bucket"), WAYS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sums_are_the_definitions(host, case, dtype, temperature, bucket):
    sums(host, given_of(case, dtype), temperature, bucket, order=1)


@pytest.mark.parametrize(("temperature", "bucket"), WAYS)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_definitions(host, case, dtypes, temperature, bucket):
    gradient(host, given_of(case, dtypes[0]), dtypes[1], temperature, bucket, order=1)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_rows_of_the_whole_vocabulary_are_launched_one_to_a_block(host, dtypes):
    given = given_of(VOCABULARY, dtypes[0])
    (launch,) = sums(host, given, 2.0, True).launches
    assert (launch.grid, launch.block, launch.cluster) == ((3, 1, 1), (512, 1, 1), 1)
    # A byte for each vector; in fp64, whose rows have no vectors, as many as fit.
    vector = {8: 1, 4: 4, 2: 8}[dtypes[0].itemsize]
    marks = min(128_256 // vector, 32_768)
    assert 0 < launch.shared_bytes - marks <= 16 * 6 * 8
    (launch,) = gradient(host, given, dtypes[1], 1.0, True).launches
    assert (launch.grid, launch.block, launch.shared_bytes) == ((3, 1, 1), (512, 1, 1), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_may_begin_anywhere_and_have_strides(host, dtype):
    logits, label, column, weight = given_of((2, 2_320, 9), dtype)
    given = displaced(logits), strided(label), strided(column), strided(weight)
    sums(host, given, 2.0, True)
    gradient(host, given, dtype, 2.0, True)


def test_numbers_in_another_type_are_converted(host):
    logits, label, column, weight = given_of((2, 64, 9), torch.float32)
    assert_sums(
        host.run(
            H200, "sparse_kl_partials", logits, label, column, weight.double(), 1.0, False
        ).result,
        sparse_kl_partials_reference(logits, label, column, weight, 1.0, False),
        torch.float32,
    )


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)], ids=str)
def test_nothing_is_as_in_the_definition(host, shape):
    logits, label = torch.empty(shape), torch.full(shape[:1], -1)
    column, weight = torch.full((shape[0], 5), -1), torch.ones(shape[0], 5)
    run = host.run(H200, "sparse_kl_partials", logits, label, column, weight, 1.0, True)
    expected = sparse_kl_partials_reference(logits, label, column, weight, 1.0, True)
    torch.testing.assert_close(run.result, expected)
    numbers = torch.ones(3, shape[0])
    words = label, column, weight, numbers, numbers, 1.0, True, torch.bfloat16
    assert not host.run(H200, "sparse_kl_gradient_", logits, *words).launches


@pytest.mark.parametrize("dtypes", PAIRS[1:4], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_the_order_of_threads_changes_no_bit(host, case, dtypes):
    runs = [
        (
            gradient(host, given_of(case, dtypes[0]), dtypes[1], 2.0, True, order).arguments[0],
            sums(host, given_of(case, dtypes[0]), 2.0, True, order).result,
        )
        for order in range(4)
    ]
    for place, partials in runs[1:]:
        assert torch.equal(place.view(torch.int32), runs[0][0].view(torch.int32))
        assert torch.equal(partials, runs[0][1])


def test_marks_of_ids_reach_over_rows_of_any_length(host):
    # 32,768 elements are marked at a time; the ids lie on either side of that.
    logits, _, label = pair(1, 70_001, torch.float32)
    column = torch.tensor([[0, 32_767, 32_768, 65_535, 65_536, 70_000, 70_000]])
    logits[0, column[0]] = 20.0
    sums(host, (logits, label, column, torch.rand(column.shape)), 1.0, True)
