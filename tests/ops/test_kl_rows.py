"""The rows of `linear_kl`, compiled ones where they are built, against the definition in fp64."""

from itertools import product

import pytest
import torch

from megatron_mlr1.ops.extension import has_row
from megatron_mlr1.ops.head_chunks import rows_in
from megatron_mlr1.ops.kl_known import COLUMNS
from megatron_mlr1.ops.kl_rows import (
    jsd_partials,
    jsd_partials_reference,
    kl_,
    kl_gradient_,
    kl_gradient_reference,
    kl_partials,
    kl_partials_reference,
    kl_reference,
)
from tests.support.logit_rows import (
    PAIRS,
    assert_gradient,
    assert_sums,
    log_sums,
    of_rows,
    pair,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DIRECTIONS = ("forward", "reverse", "jsd")
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 1024, 5003]
INF = float("inf")


def partials_of(z, t, label, device, temperature, reverse):
    """What the op and the definition in fp64 give."""
    actual = kl_partials(z.to(device), t.to(device), label.to(device), temperature, reverse)
    return actual.cpu(), kl_partials_reference(z.double(), t.double(), label, temperature, reverse)


def gradients_of(z, t, label, device, dtype, temperature, direction, beta=0.3):
    """Logits overwritten by the op, its split of the divergence, and both by the definition."""
    numbers = torch.cat((log_sums(z, t, label, temperature), of_rows(1, len(z), z.dtype)))
    weights = of_rows(3, len(z), z.dtype, seed=2)
    words = (temperature, direction, beta)
    place, wide = z.clone().to(device), z.double()
    others = [tensor.to(device) for tensor in (t, label, numbers, weights)]
    split = kl_gradient_(place, *others, *words, dtype)
    others = t.double(), label, numbers.double(), weights.double()
    expected = kl_gradient_reference(wide, *others, *words, torch.float64)
    return place.cpu(), split.cpu(), wide, expected


def one_pass(z, t, label, device, dtype, temperature, direction):
    """Logits overwritten by the op, its statistics, and both by the definition; idle rows too."""
    weights = of_rows(2, len(z), z.dtype, seed=2)
    weights[:, 1:2], weights[0, 2:3], weights[1, 3:4] = 0, 0, 0
    words = (temperature, direction, 0.3, 0.01)
    place, wide = z.clone().to(device), z.double()
    out = kl_(place, *(each.to(device) for each in (t, label, weights)), *words, dtype)
    expected = kl_reference(wide, t.double(), label, weights.double(), *words, torch.float64)
    return place.cpu(), out.cpu(), wide, expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("temperature", "reverse"), [*product((0.5, 1.0, 2.0), (False, True))])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_the_definitions(width, dtype, temperature, reverse, device):
    z, t, label = pair(5, width, dtype)
    actual, expected = partials_of(z, t, label, device, temperature, reverse)
    assert_sums(actual, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_halves_of_the_jsd_are_the_definitions(width, dtype, beta, temperature, device):
    z, t, label = pair(5, width, dtype)
    _, lse, teacher_lse = log_sums(z, t, label, temperature)
    rows = (lse - teacher_lse, lse)
    words = (temperature, beta)
    logits = [tensor.to(device) for tensor in (z, t, *rows)]
    expected = jsd_partials_reference(*(each.double() for each in (z, t, *rows)), *words)
    assert_sums(jsd_partials(*logits, *words).cpu(), expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("direction", "temperature"), [*product(DIRECTIONS, (1.0, 2.0))], ids=lambda word: str(word)
)
@pytest.mark.parametrize(("dtype", "narrow"), PAIRS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_gradient_is_the_definitions(width, dtype, narrow, direction, temperature, device):
    z, t, label = pair(5, width, dtype)
    place, split, wide, expected = gradients_of(z, t, label, device, narrow, temperature, direction)
    assert_gradient(place, wide, narrow)
    assert_sums(split, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("direction", "temperature"), [*product(DIRECTIONS, (1.0, 2.0))], ids=lambda word: str(word)
)
@pytest.mark.parametrize(("dtype", "narrow"), PAIRS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_one_pass_is_the_definition(width, dtype, narrow, direction, temperature, device):
    given = pair(5, width, dtype)
    place, out, wide, expected = one_pass(*given, device, narrow, temperature, direction)
    assert_gradient(place, wide, narrow)
    assert_sums(out, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("dtype", "narrow"), PAIRS, ids=str)
def test_one_pass_over_a_whole_vocabulary_is_the_definition(dtype, narrow, direction, device):
    given = pair(3, 128_256, dtype)
    place, out, wide, expected = one_pass(*given, device, narrow, 1.0, direction)
    assert_gradient(place, wide, narrow)
    assert_sums(out, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_huge_and_missing_logits_are_in_one_pass_as_in_the_definition(direction, device):
    z, t, label = pair(7, 2500, torch.float32)
    z[0, 3:] += 1000
    t[2, 2:] -= 1000
    z[3, 5], t[4, 6] = -INF, -INF
    z[5], t[6] = -INF, -INF
    got = one_pass(z, t, label, device, z.dtype, 1.0, direction)
    # A logit of 1000 has an error of 2^-15 in fp32, and so have logarithms of its probability.
    close = {"rtol": 5e-4, "equal_nan": True}
    torch.testing.assert_close(got[0].double(), got[2], atol=1e-6, **close)
    torch.testing.assert_close(got[1].double(), got[3], atol=1e-3, **close)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_row_that_weighs_nothing_has_no_gradient_whatever_its_logits_are(direction, device):
    z, t, label = pair(3, 2500, torch.float32)
    z[1, 700:], t[1, 3], z[1, 5] = torch.nan, INF, INF
    numbers, weights = of_rows(4, 3, z.dtype), of_rows(3, 3, z.dtype)
    weights[:, 1] = 0
    words = (1.0, direction, 0.3)
    place, others = z.clone().to(device), [each.to(device) for each in (t, label, numbers, weights)]
    kl_gradient_(place, *others, *words, torch.bfloat16)
    once = one_pass(z, t, label, device, torch.bfloat16, 1.0, direction)
    for logits in (place, once[0]):
        gradient = rows_in(logits.cpu(), torch.bfloat16)
        assert not gradient[1].any()
        assert gradient[[0, 2]].isfinite().all()
    assert once[1][0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reverse", [False, True])
def test_huge_logits_and_missing_ones_count_as_in_the_definition(reverse, device):
    z, t, label = pair(8, 2500, torch.float32)
    z[0, 3:] += 1e4
    t[1, -2] = 1e4
    z[2], t[2] = 100 * z[2], -100 * t[2]
    z[3, 5], t[4, 6], z[5, 7], t[5, 7] = -INF, -INF, -INF, -INF
    z[6], t[7] = -INF, -INF
    actual, expected = partials_of(z, t, label, device, 2.0, reverse)
    assert expected[:, :3].isfinite().all()
    assert expected[:, 3:].isnan().any(0).sum() >= (5 if reverse else 3)
    # The cross sum may be the small difference of terms of many thousands.
    cross = 7 if reverse else 6
    close = {"rtol": 1e-4, "atol": 0.1, "equal_nan": True}
    torch.testing.assert_close(actual[cross].double(), expected[cross], **close)
    actual[cross], expected[cross] = 0, 0
    assert_sums(actual, expected, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_gradient_of_huge_and_missing_logits_is_the_definitions(direction, device):
    z, t, label = pair(4, 2500, torch.float32)
    z[0, 3:] += 1000
    t[1, 2:] -= 1000
    z[2, 5], t[3, 6] = -INF, -INF
    place, split, wide, expected = gradients_of(z, t, label, device, z.dtype, 1.0, direction)
    # A logit of 1000 has an error of 2^-15 in fp32, and so have logarithms of its probability.
    torch.testing.assert_close(place.double(), wide, rtol=5e-4, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(split.double(), expected, rtol=5e-4, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(4, 0), (0, 9), (0, 0)], ids=str)
def test_without_ids_or_tokens_it_gives_what_the_definition_gives(shape, device):
    z, t, label = pair(*shape, torch.float32)
    label.fill_(-1)
    actual, expected = partials_of(z, t, label, device, 2.0, False)
    assert torch.equal(actual.double(), expected)
    numbers, weights = torch.rand(4, shape[0]), torch.rand(3, shape[0])
    arguments = [tensor.to(device) for tensor in (z, t, label, numbers, weights)]
    split = kl_gradient_(*arguments, 2.0, "forward", 0.5, torch.bfloat16)
    assert torch.equal(split.cpu(), torch.zeros(3, shape[0]))
    halves = jsd_partials(*arguments[:2], *numbers[:2].to(device), 2.0, 0.5)
    assert torch.equal(halves.cpu(), torch.zeros(2, shape[0]))


@pytest.mark.parametrize("device", DEVICES)
def test_without_tokens_one_pass_gives_nothing(device):
    z = torch.empty(0, 9, device=device)
    label = torch.empty(0, dtype=torch.int64, device=device)
    out = kl_(z, z.clone(), label, z.new_empty(2, 0), 2.0, "jsd", 0.5, 0.0, torch.bfloat16)
    assert out.shape == (len(COLUMNS), 0)


@pytest.mark.parametrize("device", DEVICES)
def test_of_several_largest_logits_of_the_teacher_the_first_counts(device):
    z, t, label = pair(4, 6000, torch.float32)
    for row, columns in enumerate([(5999, 4000), (17, 18), (2, 2048 + 2), (1023, 1024, 5000)]):
        t[row, columns] = 99.0
    actual, _ = partials_of(z, t, label, device, 1.0, False)
    assert actual[11].tolist() == [z[0, 4000], z[1, 17], z[2, 2], z[3, 1023]]


@pytest.mark.parametrize("device", DEVICES)
def test_memory_may_begin_anywhere(device):
    z, t, label = pair(3, 1028, torch.float32)
    place = torch.empty(2, z.numel() + 1, device=device)[:, 1:].view(2, 3, 1028)
    for moved, logits in zip(place, (z, t), strict=True):
        moved.copy_(logits)
    sums = kl_partials(*place, label.to(device), 2.0, False).cpu()
    assert_sums(sums, kl_partials_reference(z.double(), t.double(), label, 2.0, False), z.dtype)
    numbers = torch.cat((log_sums(z, t, label, 2.0), of_rows(1, 3, z.dtype)))
    weights = of_rows(3, 3, z.dtype)
    kl_gradient_(
        *place, *(each.to(device) for each in (label, numbers, weights)), 2.0, "jsd", 0.5, z.dtype
    )
    wide = z.double()
    numbers, weights = numbers.double(), weights.double()
    words = (2.0, "jsd", 0.5, torch.float64)
    kl_gradient_reference(wide, t.double(), label, numbers, weights, *words)
    assert_gradient(place[0].cpu(), wide, z.dtype)
    place[0].copy_(z)
    wide = z.double()
    arguments = label, weights[:2].to(z.dtype)
    words = (2.0, "jsd", 0.5, 0.01)
    out = kl_(*place, *(each.to(device) for each in arguments), *words, z.dtype)
    expected = kl_reference(wide, t.double(), label, weights[:2], *words, torch.float64)
    assert_gradient(place[0].cpu(), wide, z.dtype)
    assert_sums(out.cpu(), expected, z.dtype)


def results(z, t, label, direction):
    sums = kl_partials(z, t, label, 2.0, direction == "reverse")
    place, split, _, _ = gradients_of(z, t, label, "cpu", torch.bfloat16, 2.0, direction)
    once, out, _, _ = one_pass(z, t, label, "cpu", torch.bfloat16, 2.0, direction)
    return sums, place.view(torch.int32), split, once.view(torch.int32), out


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_number_of_threads_changes_no_bit(direction):
    arguments = (*pair(9, 20_011, torch.float32), direction)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(*arguments)
        torch.set_num_threads(3)
        together = results(*arguments)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.gpu
@pytest.mark.ext
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_hundred_runs_on_a_gpu_give_equal_bits(direction):
    z, t, label = pair(64, 128_256, torch.float32)
    numbers = torch.cat((log_sums(z, t, label, 2.0), of_rows(1, 64, z.dtype)))
    z, t, label, numbers = (each.cuda() for each in (z, t, label, numbers))
    weights = of_rows(3, 64, z.dtype).cuda()

    def once():
        sums = kl_partials(z, t, label, 2.0, direction == "reverse")
        halves = jsd_partials(z, t, numbers[1] - numbers[2], numbers[1], 2.0, 0.3)
        place, words = z.clone(), (2.0, direction, 0.3, torch.bfloat16)
        split = kl_gradient_(place, t, label, numbers, weights, *words)
        in_one, words = z.clone(), (2.0, direction, 0.3, 0.01, torch.bfloat16)
        out = kl_(in_one, t, label, weights[:2], *words)
        return sums, halves, split, place.view(torch.int32), out, rows_in(in_one, words[-1])

    first = once()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.ext
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_rows_take_the_place_of_the_definitions(device):
    for op in ("kl_partials", "jsd_partials", "kl_gradient_", "kl_"):
        assert has_row(f"mlr1::{op}", device.upper())


@pytest.mark.ext
def test_refuses_a_gradient_that_does_not_fit_into_the_logits():
    z, t, label = pair(2, 5, torch.float32)
    numbers, weights = of_rows(4, 2, z.dtype), of_rows(3, 2, z.dtype)
    with pytest.raises(RuntimeError, match="gradient"):
        kl_gradient_(z, t, label, numbers, weights, 1.0, "forward", 0.5, torch.float64)
