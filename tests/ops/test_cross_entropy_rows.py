"""Cross-entropy's row ops on every row there is, against their definitions in float64."""

import pytest
import torch

from megatron_mlr1.ops.cross_entropy_rows import (
    cross_entropy_,
    cross_entropy_gradient_,
    cross_entropy_gradient_reference,
    cross_entropy_partials,
    cross_entropy_partials_reference,
    cross_entropy_reference,
)
from megatron_mlr1.ops.extension import has_row
from megatron_mlr1.ops.head_chunks import rows_in

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
# Of a result, relative: its type's rounding, and of fp32 some 2^-17 of a small probability, for its
# exponential. bf16 results are the rounded fp32 ones.
ROUNDING = {
    torch.float64: 2**-44,
    torch.float32: 2**-16,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
Z_LOSS = 1e-2
# Rows of many and of part of a tile, of odd lengths, of one logit; more rows than one task takes.
SHAPES = [(6, 5000), (7, 2051), (70, 33), (3, 1)]
LONG = [(9, 128_256), (5, 128_257), (1, 600_000), (700, 8_200)]
"""For a GPU: rows that the shared memory of a cluster holds, without vectors, and too long ones."""


def inputs(shape, dtype, device, *, largest=12.0):
    """Logits, labels, weights; the labels reach both ends, one is not there; two weights are 0."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    logits = (largest / 3 * torch.randn(shape, generator=generator)).to(dtype)
    logits[0] = logits[0, 0]
    label = torch.randint(columns, (rows,), generator=generator)
    label[:3] = torch.tensor([0, columns - 1, -1])[:rows]
    weight = 0.1 + torch.rand(rows, generator=generator)
    weight[3:5] = 0
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    return logits.to(device), label.to(device), weight.to(device, statistics)


def assert_close(actual, expected, dtype):
    rounding = ROUNDING[dtype]
    close = {"rtol": rounding, "atol": min(rounding, 2**-20)}
    torch.testing.assert_close(actual.double(), expected.double(), **close)


def cases(*types):
    """Each shape on the CPU, each and the long ones on a GPU."""
    shapes = [("cpu", shape) for shape in SHAPES] + [("cuda", shape) for shape in SHAPES + LONG]
    return [
        pytest.param(
            *(device, shape, *kinds),
            id=f"{device}-{shape}-{'-'.join(map(str, kinds))}",
            marks=[pytest.mark.gpu] if device == "cuda" else [],
        )
        for device, shape in shapes
        for kinds in types
    ]


@pytest.mark.parametrize(("device", "shape", "dtype"), cases(*((dtype,) for dtype in ROUNDING)))
def test_partials_match_their_definition(device, shape, dtype):
    logits, label, _ = inputs(shape, dtype, device)
    out = cross_entropy_partials(logits, label)
    expected = cross_entropy_partials_reference(logits.double(), label)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(out, expected, out.dtype)


@pytest.mark.parametrize(("device", "shape", "dtype", "narrow"), cases(*TYPES))
def test_gradients_match_their_definition(device, shape, dtype, narrow):
    logits, label, weight = inputs(shape, dtype, device)
    lse, pull = logits.double().logsumexp(1).to(weight.dtype), 1.25 * weight
    wide = logits.double().clone()
    cross_entropy_gradient_reference(
        wide, label, lse.double(), pull.double(), weight.double(), torch.float64
    )
    cross_entropy_gradient_(logits, label, lse, pull, weight, narrow)
    assert_close(rows_in(logits, narrow), wide, narrow)


@pytest.mark.parametrize(("device", "shape", "dtype", "narrow"), cases(*TYPES))
def test_one_pass_matches_its_definition(device, shape, dtype, narrow):
    logits, label, weight = inputs(shape, dtype, device)
    wide = logits.double().clone()
    expected = cross_entropy_reference(wide, label, weight.double(), Z_LOSS, torch.float64)
    out = cross_entropy_(logits, label, weight, Z_LOSS, narrow)
    assert_close(out, expected, out.dtype)
    assert_close(rows_in(logits, narrow), wide, narrow)


@pytest.mark.parametrize("device", DEVICES)
def test_huge_logits_are_as_exact_as_small_ones(device):
    logits, label, weight = inputs((6, 5000), torch.float32, device, largest=1e4)
    logits[5] = 1e4 + torch.linspace(-8, 8, 5000)
    wide = logits.double()
    expected = cross_entropy_reference(wide, label, weight.double(), 0.0, torch.float64)
    out = cross_entropy_(logits, label, weight, 0.0, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=2**-22, atol=2**-20)
    # The definition takes off a rounded lse, which is worth 2^-11 here.
    torch.testing.assert_close(logits.double(), wide, rtol=2**-9, atol=2**-20)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_of_minus_infinity_have_no_probability(device):
    logits, label, weight = inputs((6, 5000), torch.float32, device)
    logits[:, 1::2] = -torch.inf
    wide = logits.double()
    cross_entropy_reference(wide, label, weight.double(), Z_LOSS, torch.float64)
    cross_entropy_(logits, label, weight, Z_LOSS, torch.float32)
    assert_close(logits, wide, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_without_weight_get_zeros_whatever_their_logits_are(device):
    logits, label, weight = inputs((6, 5000), torch.float32, device)
    logits[3, 17] = torch.nan
    cross_entropy_(logits, label, weight, Z_LOSS, torch.bfloat16)
    gradient = rows_in(logits, torch.bfloat16)
    assert not gradient[3:5].any()
    assert gradient[[0, 1, 2, 5]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number_stays_visible(device):
    logits, label, weight = inputs((6, 5000), torch.float32, device)
    logits[1, 4000] = torch.nan
    partials = cross_entropy_partials(logits, label)
    out = cross_entropy_(logits, label, weight, Z_LOSS, torch.bfloat16)
    assert partials[1].isnan().tolist() == [False, True, False, False, False, False]
    assert out[0].isnan().tolist() == [False, True, False, False, False, False]
    assert rows_in(logits, torch.bfloat16)[1].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_and_no_ids_are_fine(device):
    for shape in ((0, 40), (3, 0)):
        logits = torch.empty(shape, device=device)
        label = torch.full(shape[:1], -1, device=device)
        weight = torch.ones(shape[0], device=device)
        partials = cross_entropy_partials(logits, label)
        assert torch.equal(partials, cross_entropy_partials_reference(logits, label))
        cross_entropy_gradient_(logits, label, weight, weight, weight, torch.bfloat16)
    assert cross_entropy_(logits[:0], label[:0], weight[:0], 0.0, torch.float32).shape == (2, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_are_ops_that_torch_can_trace(device):
    logits, label, weight = inputs((6, 50), torch.float32, device)
    lse = logits.logsumexp(1)
    ops = torch.ops.mlr1
    torch.library.opcheck(ops.cross_entropy_partials.default, (logits, label))
    row = (label, lse, weight, weight, torch.bfloat16)
    torch.library.opcheck(ops.cross_entropy_gradient_.default, (logits, *row))
    both = (label, weight, Z_LOSS, torch.bfloat16)
    torch.library.opcheck(ops.cross_entropy_.default, (logits, *both))


def test_the_number_of_threads_changes_no_bit():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        logits, label, weight = inputs((40, 5000), torch.float32, "cpu")
        out = cross_entropy_(logits, label, weight, Z_LOSS, torch.float32)
        results.append((out, logits))
    torch.set_num_threads(before)
    for out, logits in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(logits, results[0][1])


@pytest.mark.ext
@pytest.mark.parametrize("key", ["CPU", pytest.param("CUDA", marks=pytest.mark.gpu)])
def test_compiled_rows_take_the_place_of_the_definitions(key):
    names = ("cross_entropy_partials", "cross_entropy_gradient_", "cross_entropy_")
    assert all(has_row(f"mlr1::{name}", key) for name in names)


@pytest.mark.ext
def test_refuses_a_gradient_that_does_not_fit_the_place_of_its_logits():
    logits, label, weight = inputs((6, 50), torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match="a gradient of type Float in the place of logits"):
        cross_entropy_(logits, label, weight, 0.0, torch.float32)
    with pytest.raises(RuntimeError, match="contiguous"):
        cross_entropy_partials(logits.mT, label)


@pytest.mark.ext
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 128_256), (5, 128_257), (20, 600_000)], ids=str)
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_runs_on_a_gpu_have_equal_bits(shape, narrow):
    first = None
    logits, label, weight = inputs(shape, torch.float32, "cuda")
    for _ in range(100):
        here = logits.clone()
        partials = cross_entropy_partials(here, label)
        lse = partials[0] + partials[1].log()
        alone = logits.clone()
        cross_entropy_gradient_(alone, label, lse, weight, weight, narrow)
        out = cross_entropy_(here, label, weight, Z_LOSS, narrow)
        result = partials, out, rows_in(alone, narrow), rows_in(here, narrow)
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))
