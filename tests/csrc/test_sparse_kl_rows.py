"""The kernels of `linear_sparse_kl`'s rows, run on a CPU, against the definition in fp64."""

from itertools import product

import pytest
import torch

from megatron_mlr1.ops.sparse_kl_rows import (
    sparse_kl_gradient_reference,
    sparse_kl_partials_reference,
)
from megatron_mlr1.ops.wide_matmul import wide_dtype
from tests.support.logit_rows import (
    PAIRS,
    assert_gradient,
    assert_sums,
    log_sums,
    of_rows,
    pair,
    target,
)

# Rows of many tiles, and of few ids; 700 ids of a target are more than a block has threads.
SHAPES = {True: [(2, 20_504, 700), (3, 16, 9)], False: [(2, 10_301, 700), (3, 5, 9), (3, 5, 0)]}
CASES = [(*shape, vectors) for vectors, shapes in SHAPES.items() for shape in shapes]
WAYS = [*product((1.0, 2.0), (0, 1))]
"""Temperature, and whether the others are a bucket."""

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def placed(kernels, tensors, vectors):
    """Put tensors where an access before or behind them is found."""
    return [kernels.place(each, alignment=16 if vectors else None) for each in tensors]


def sums(kernels, case, dtype, temperature, bucket, order):
    """What the kernel and the definition in fp64 give."""
    rows, width, named, vectors = case
    logits, _, label = pair(rows, width, dtype)
    given = (logits, label, *target(rows, width, named, dtype))
    out = torch.full((6, rows), torch.nan, dtype=wide_dtype(dtype))
    inputs = placed(kernels, (*given, out), vectors)
    words = (rows, width, named, temperature, bucket, dtype, vectors)
    kernels.run("partials", *inputs, *words, order=order)
    wide = given[0].double(), *given[1:3], given[3].double()
    return inputs[4], sparse_kl_partials_reference(*wide, temperature, bool(bucket))


def gradient(kernels, case, dtypes, temperature, bucket, order):
    """Logits, overwritten by the kernel, and by the definition in fp64."""
    rows, width, named, vectors = case
    dtype, narrow = dtypes
    logits, _, label = pair(rows, width, dtype)
    column, weight = target(rows, width, named, dtype)
    if named:
        label[-1] = column[-1, 0].clamp(min=0)
    log_sum = log_sums(logits, logits, label, temperature)[:2]
    numbers = torch.cat((log_sum, of_rows(1, rows, dtype)))
    factors = of_rows(3, rows, dtype, seed=2)
    wide, room = logits.double(), torch.full_like(weight, torch.nan)
    given = (logits, label, column, weight, numbers, factors, room)
    inputs = placed(kernels, given, vectors)
    words = (rows, width, named, temperature, bucket, dtype, narrow, vectors)
    kernels.run("gradient", *inputs, *words, order=order)
    others = label, column, weight.double(), numbers.double(), factors.double()
    sparse_kl_gradient_reference(wide, *others, temperature, bool(bucket), torch.float64)
    return inputs[0], wide


@pytest.mark.parametrize(("temperature", "bucket"), WAYS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sums_are_the_definitions(emulated, case, dtype, temperature, bucket):
    kernels = emulated("sparse_kl_rows")
    assert_sums(*sums(kernels, case, dtype, temperature, bucket, order=1), dtype)


@pytest.mark.parametrize(("temperature", "bucket"), WAYS)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_definitions(emulated, case, dtypes, temperature, bucket):
    kernels = emulated("sparse_kl_rows")
    place, wide = gradient(kernels, case, dtypes, temperature, bucket, order=1)
    assert_gradient(place, wide, dtypes[1])


@pytest.mark.parametrize("dtypes", PAIRS[1:4], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_the_order_of_threads_changes_no_bit(emulated, case, dtypes):
    kernels = emulated("sparse_kl_rows")
    runs = [
        (
            gradient(kernels, case, dtypes, 2.0, 1, order)[0],
            sums(kernels, case, dtypes[0], 2.0, 1, order)[0],
        )
        for order in range(4)
    ]
    for place, partials in runs[1:]:
        assert torch.equal(place.view(torch.int32), runs[0][0].view(torch.int32))
        assert torch.equal(partials, runs[0][1])


def test_marks_of_ids_reach_over_rows_of_any_length(emulated):
    # 32,768 elements are marked at a time; the ids lie on either side of that.
    kernels = emulated("sparse_kl_rows")
    logits, _, label = pair(1, 70_001, torch.float32)
    column = torch.tensor([[0, 32_767, 32_768, 65_535, 65_536, 70_000, 70_000]])
    logits[0, column[0]] = 20.0
    weight, out = torch.rand(column.shape), torch.full((6, 1), torch.nan)
    inputs = placed(kernels, (logits, label, column, weight, out), vectors=False)
    kernels.run("partials", *inputs, 1, 70_001, 7, 1.0, 1, torch.float32, 0)
    wide = logits.double(), label, column, weight.double()
    assert_sums(inputs[4], sparse_kl_partials_reference(*wide, 1.0, True), torch.float32)
