"""The kernels of `linear_kl`'s rows, run on a CPU, against the definition in fp64."""

from itertools import product

import pytest
import torch

from megatron_mlr1.ops.kl_rows import (
    jsd_partials_reference,
    kl_gradient_reference,
    kl_partials_reference,
)
from megatron_mlr1.ops.wide_matmul import wide_dtype
from tests.support.logit_rows import PAIRS, assert_gradient, assert_sums, log_sums, of_rows, pair

DIRECTIONS = ("forward", "reverse", "jsd")
# In vectors a block takes 4,096 elements of fp32 at a time, else 2,048: the longest rows are six
# such tiles, the last one cut short, and the narrow gradient moves over all of them.
SHAPES = {True: [(2, 20_504), (3, 16)], False: [(2, 10_301), (3, 5)]}
CASES = [(*shape, vectors) for vectors, shapes in SHAPES.items() for shape in shapes]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def placed(kernels, tensors, vectors):
    """Put tensors where an access before or behind them is found."""
    return [kernels.place(each, alignment=16 if vectors else None) for each in tensors]


@pytest.mark.parametrize(("temperature", "reverse"), [*product((1.0, 2.0), (0, 1))])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "vectors"), CASES)
def test_sums_are_the_definitions(emulated, rows, width, vectors, dtype, temperature, reverse):
    kernels = emulated("kl_rows")
    z, t, label = pair(rows, width, dtype)
    out = torch.full((12, rows), torch.nan, dtype=wide_dtype(dtype))
    z, t, label, out = placed(kernels, (z, t, label, out), vectors)
    words = (rows, width, temperature, reverse, dtype, vectors)
    kernels.run("partials", z, t, label, out, *words, order=reverse)
    expected = kl_partials_reference(z.double(), t.double(), label, temperature, bool(reverse))
    assert_sums(out, expected, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "vectors"), CASES)
def test_halves_of_the_jsd_are_the_definitions(emulated, rows, width, vectors, dtype):
    kernels = emulated("kl_rows")
    z, t, label = pair(rows, width, dtype)
    _, lse, teacher_lse = log_sums(z, t, label, 2.0)
    out = torch.full((2, rows), torch.nan, dtype=wide_dtype(dtype))
    inputs = placed(kernels, (z, t, lse - teacher_lse, lse, out), vectors)
    kernels.run("jsd", *inputs, rows, width, 2.0, 0.2, dtype, vectors, order=1)
    expected = jsd_partials_reference(*(each.double() for each in inputs[:4]), 2.0, 0.2)
    assert_sums(inputs[4], expected, dtype)


def gradient(kernels, case, dtypes, temperature, direction, order):
    """Logits, overwritten by the kernel, its split, and both by the definition in fp64."""
    rows, width, vectors = case
    dtype, narrow = dtypes
    z, t, label = pair(rows, width, dtype)
    label[-1] = width - 1
    numbers = torch.cat((log_sums(z, t, label, temperature), of_rows(1, rows, dtype)))
    weights = of_rows(3, rows, dtype, seed=2)
    split = torch.full((3, rows), torch.nan, dtype=wide_dtype(dtype))
    wide, inputs = z.double(), placed(kernels, (z, t, label, numbers, weights, split), vectors)
    words = (temperature, DIRECTIONS.index(direction), 0.2, dtype, narrow, vectors)
    kernels.run("gradient", *inputs, rows, width, *words, order=order)
    others = t.double(), label, numbers.double(), weights.double()
    words = (temperature, direction, 0.2, torch.float64)
    expected = kl_gradient_reference(wide, *others, *words)
    return inputs[0], inputs[5], wide, expected


@pytest.mark.parametrize(("direction", "temperature"), [*product(DIRECTIONS, (1.0, 2.0))])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_definitions(emulated, case, dtypes, direction, temperature):
    kernels = emulated("kl_rows")
    place, split, wide, expected = gradient(kernels, case, dtypes, temperature, direction, 1)
    assert_gradient(place, wide, dtypes[1])
    assert_sums(split, expected, dtypes[0])


@pytest.mark.parametrize("dtypes", PAIRS[1:4], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_the_order_of_threads_changes_no_bit(emulated, case, dtypes):
    kernels = emulated("kl_rows")
    runs = [gradient(kernels, case, dtypes, 1.0, "forward", order)[:2] for order in range(4)]
    for place, split in runs[1:]:
        assert torch.equal(place.view(torch.int32), runs[0][0].view(torch.int32))
        assert torch.equal(split, runs[0][1])


def test_of_several_largest_logits_of_the_teacher_the_first_counts(emulated):
    kernels = emulated("kl_rows")
    z, t, label = pair(4, 6000, torch.float32)
    for row, columns in enumerate([(5999, 4000), (17, 18), (2, 2050), (1023, 1024, 5000)]):
        t[row, columns] = 99.0
    for order in range(4):
        out = torch.full((12, 4), torch.nan)
        inputs = placed(kernels, (z, t, label, out), vectors=True)
        kernels.run("partials", *inputs, 4, 6000, 1.0, 0, torch.float32, 1, order=order)
        assert inputs[3][11].tolist() == [z[0, 4000], z[1, 17], z[2, 2], z[3, 1023]]


@pytest.mark.parametrize("reverse", [0, 1])
def test_logits_that_are_huge_or_missing_count_as_in_the_definition(emulated, reverse):
    kernels = emulated("kl_rows")
    z, t, label = pair(6, 2500, torch.float32)
    z[0, 3:] += 1e4
    t[1, -2] = 1e4
    z[2, 5], t[3, 6] = float("-inf"), float("-inf")
    z[4], t[5] = float("-inf"), float("-inf")
    out = torch.full((12, 6), torch.nan)
    inputs = placed(kernels, (z, t, label, out), vectors=True)
    kernels.run("partials", *inputs, 6, 2500, 2.0, reverse, torch.float32, 1)
    expected = kl_partials_reference(z.double(), t.double(), label, 2.0, bool(reverse))
    assert expected[:, :2].isfinite().all()
    assert_sums(inputs[3], expected, torch.float32)
