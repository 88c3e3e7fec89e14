"""The kernels of `linear_kl`'s rows, run on a CPU, against the definition in fp64; `kl_` as its
CUDA row launches it, too."""

from itertools import product

import pytest
import torch

from megatron_mlr1.ops.head_chunks import rows_in
from megatron_mlr1.ops.kl_known import COLUMNS
from megatron_mlr1.ops.kl_rows import (
    jsd_partials_reference,
    kl_gradient_reference,
    kl_partials_reference,
    kl_reference,
)
from megatron_mlr1.ops.wide_matmul import wide_dtype
from tests.csrc.devices import A100, DEVICES, H200, displaced, strided
from tests.support.logit_rows import PAIRS, assert_gradient, assert_sums, log_sums, of_rows, pair

DIRECTIONS = ("forward", "reverse", "jsd")
# In vectors a block takes 4,096 elements of fp32 at a time, else 2,048: the longest rows are six
# such tiles, the last one cut short, and the narrow gradient moves over all of them.
SHAPES = {True: [(2, 20_504), (3, 16)], False: [(2, 10_301), (3, 5)]}
CASES = [(*shape, vectors) for vectors, shapes in SHAPES.items() for shape in shapes]
# Of `kl_` a block has 64 threads: 512 elements of fp32 at a time, else 256. Rows of 2,320 are some
# such tiles in every block of a small cluster and less than one in those of a large one; of 5
# columns most threads and some blocks get nothing. The last word is the part of its teacher's
# logits that a block keeps; None: it keeps none of either's.
ONE_PASS = [
    *product([(2320, True)], [(1, None), (1, 0.0), (4, 0.5), (8, 1.0)]),
    *product([(1003, False)], [(1, None), (2, 0.6)]),
    ((5, False), (4, 1.0)),
    ((1, False), (1, 1.0)),
]
WAYS = [*product((1.0, 2.0), DIRECTIONS)]
# Every way of two types that training has, and each direction of the others.
TYPES_AND_WAYS = [
    *product([PAIRS[2], PAIRS[4]], WAYS),
    *product([*PAIRS[:2], PAIRS[3], PAIRS[5]], [(2.0, "forward"), (1.0, "reverse"), (1.0, "jsd")]),
]
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


def one_pass(kernels, case, dtypes, words, *, order=0, given=None):
    """Logits, overwritten by the kernel, its statistics, and both by the definition in fp64."""
    (width, vectors), (cluster, kept) = case
    dtype, narrow = dtypes
    z, t, label = given or pair(3, width, dtype)
    label[-1] = width - 1
    rows, temperature, direction = len(z), *words
    weights = of_rows(2, rows, dtype, seed=2)
    weights[:, 1], weights[0, 2] = 0, 0
    out = torch.full((len(COLUMNS), rows), torch.nan, dtype=wide_dtype(dtype))
    inputs = placed(kernels, (z, t, label, weights, out), vectors)
    vector = 16 // z.element_size() if vectors and dtype != torch.float64 else 1
    share = -(-width // (cluster * vector)) * vector
    kept_t = int((kept or 0) * share) // vector * vector
    wide = z.double()
    kernels.run(
        *("both", *inputs, rows, width, temperature, DIRECTIONS.index(direction), 0.2, 0.01),
        *(dtype, narrow, vectors, cluster, kept is not None, kept_t),
        order=order,
    )
    others = t.double(), label, weights.double()
    expected = kl_reference(wide, *others, temperature, direction, 0.2, 0.01, torch.float64)
    return inputs[0], inputs[4], wide, expected


@pytest.mark.parametrize(("dtypes", "words"), TYPES_AND_WAYS, ids=str)
@pytest.mark.parametrize("case", ONE_PASS, ids=str)
def test_one_pass_is_the_definition(emulated, case, dtypes, words):
    kernels = emulated("kl_rows")
    place, out, wide, expected = one_pass(kernels, case, dtypes, words, order=1)
    assert_gradient(place, wide, dtypes[1])
    assert_sums(out, expected, dtypes[0])


@pytest.mark.parametrize("words", [(2.0, "reverse"), (1.0, "jsd")], ids=str)
@pytest.mark.parametrize("case", [ONE_PASS[0], ONE_PASS[2], ONE_PASS[4], ONE_PASS[5]], ids=str)
def test_the_order_of_threads_changes_no_bit_of_one_pass(emulated, case, words):
    kernels = emulated("kl_rows")
    types = torch.float32, torch.bfloat16
    runs = [one_pass(kernels, case, types, words, order=order)[:2] for order in range(4)]
    for place, out in runs[1:]:
        assert torch.equal(rows_in(place, types[1]), rows_in(runs[0][0], types[1]))
        assert torch.equal(out, runs[0][1])


@pytest.mark.parametrize("case", [ONE_PASS[0], ONE_PASS[2]], ids=str)
def test_a_row_that_weighs_nothing_has_no_gradient_whatever_its_logits_are(emulated, case):
    kernels = emulated("kl_rows")
    z, t, label = pair(3, case[0][0], torch.float32)
    z[1, 700:], t[1, 3] = torch.nan, torch.inf
    given, types = (z, t, label), (torch.float32, torch.bfloat16)
    place, out, wide, _ = one_pass(kernels, case, types, (1.0, "forward"), given=given)
    assert not rows_in(place, types[1])[1].any()
    assert out[0].isnan().tolist() == [False, True, False]
    assert_gradient(place, wide, types[1])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", [ONE_PASS[0], ONE_PASS[2]], ids=str)
def test_huge_and_missing_logits_are_in_one_pass_as_in_the_definition(emulated, case, direction):
    kernels = emulated("kl_rows")
    z, t, label = pair(7, case[0][0], torch.float32)
    z[0, 3:] += 1000
    t[2, 2:] -= 1000
    z[3, 5], t[4, 6] = -torch.inf, -torch.inf
    z[5], t[6] = -torch.inf, -torch.inf
    given, types = (z, t, label), (torch.float32, torch.float32)
    got = one_pass(kernels, case, types, (1.0, direction), given=given, order=1)
    # A logit of 1000 has an error of 2^-15 in fp32, and so have logarithms of its probability.
    close = {"rtol": 5e-4, "atol": 1e-3, "equal_nan": True}
    torch.testing.assert_close(got[0].double(), got[2], rtol=5e-4, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(got[1].double(), got[3], **close)


def test_one_pass_finds_the_first_of_several_largest_logits_of_the_teacher(emulated):
    kernels = emulated("kl_rows")
    z, t, label = pair(4, 2320, torch.float32)
    columns = [(2319, 1500), (17, 18), (2, 2050), (1023, 1024, 2000)]
    for row, places in enumerate(columns):
        t[row, places] = 99.0
        z[row, min(places)] = 50.0 if row % 2 else z[row].min()
    for case, order in product([ONE_PASS[0], ONE_PASS[2]], range(3)):
        words = (torch.float32, torch.float32), (1.0, "forward")
        out = one_pass(kernels, case, *words, order=order, given=(z, t, label))[1]
        assert out[COLUMNS.index("agreement")].tolist() == [0, 1, 0, 1]


def launched(host, device, given, dtypes, direction="forward", temperature=1.0, order=0):
    """Run the CUDA row of `kl_`, compare with the definition, give the one launch."""
    z, t, label = given
    rows, (dtype, narrow) = len(z), dtypes
    weights = of_rows(2, rows, dtype, seed=2)
    weights[:, 1:2] = 0
    words = temperature, direction, 0.2, 0.01
    run = host.run(device, "kl_", z, t, label, strided(weights), *words, narrow, order=order)
    wide, others = z.double(), (t.double(), label, weights.double())
    expected = kl_reference(wide, *others, *words, torch.float64)
    assert_gradient(run.arguments[0], wide, narrow)
    assert_sums(run.result, expected, dtype)
    (launch,) = run.launches
    assert launch.grid == (rows * launch.cluster, 1, 1)
    return launch


# Blocks of a cluster, elements that each keeps of z and of t, and bytes of its reductions. Two
# blocks of 115,712 bytes fill a multiprocessor of an H200; one block may have 232,448.
KEPT = {
    ("H200", torch.float32, 128_256): (8, 16_032 + 12_588, 1232),
    ("H200", torch.bfloat16, 128_256): (8, 2 * 16_032, 1232),
    ("H200", torch.float64, 128_256): (8, 16_032 + 12_718, 2448),
    ("H200", torch.float32, 32_063): (4, 2 * 8_016, 1232),
    ("H200", torch.float32, 2_320): (1, 2 * 2_320, 1232),
    ("slice", torch.float32, 128_256): (4, 32_064 + 25_740, 1232),
    ("A100", torch.bfloat16, 32_064): (1, 32_064 + 8_792, 1232),
    ("A100", torch.float32, 128_256): (1, 0, 1232),
    ("L40S", torch.float32, 32_064): (1, 0, 1232),
    ("old code", torch.float32, 128_256): (1, 0, 1232),
}


@pytest.mark.parametrize(("device", "dtype", "width"), KEPT, ids=str)
def test_a_cluster_keeps_what_it_has_room_for(host_code, device, dtype, width):
    narrow = torch.bfloat16 if dtype == torch.float32 else dtype
    given, host = pair(2, width, dtype), host_code("kl_rows")
    launch = launched(host, DEVICES[device], given, (dtype, narrow), "reverse", order=1)
    cluster, kept, reductions = KEPT[device, dtype, width]
    assert launch.cluster == cluster
    assert launch.shared_bytes == reductions + kept * dtype.itemsize


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_one_pass_of_every_type_on_every_device(host_code, dtypes, device):
    for width, direction in ((16_387, "forward"), (2_064, "jsd"), (1, "reverse")):
        given = pair(2, width, dtypes[0])
        launched(host_code("kl_rows"), device, given, dtypes, direction, 2.0, order=2)


@pytest.mark.parametrize("place", [0, 1], ids=["student", "teacher"])
def test_logits_of_one_pass_may_begin_anywhere(host_code, place):
    z, t, label = pair(2, 2_320, torch.float32)
    z, t = (displaced(z), t) if place == 0 else (z, displaced(t))
    types = torch.float32, torch.bfloat16
    launched(host_code("kl_rows"), H200, (z, t, strided(label)), types, "jsd")


def test_one_pass_over_no_tokens_launches_nothing(host_code):
    z, label = torch.empty(0, 64), torch.empty(0, dtype=torch.int64)
    words = z, z, label, torch.empty(2, 0), 1.0, "forward", 0.5, 0.0, torch.bfloat16
    run = host_code("kl_rows").run(H200, "kl_", *words)
    assert run.result.shape == (len(COLUMNS), 0)
    assert not run.launches
