"""csrc/swiglu_fp8.cu, run whole on a CPU, against the definition."""

import pytest
import torch

from megatron_mlr1.ops.swiglu_fp8 import swiglu_fp8_reference
from tests.csrc.devices import H200, displaced, strided

# Less than a tile, tiles and a part of one in both directions, shapes that no vector divides, and
# the models' widths.
CASES = [(8, 24), (136, 144), (256, 128), (131, 37), (1, 130), (3, 1)]
CASES += [(4, 2048), (3, 4096), (4, 6144)]
ORDERS = (0, 1, 2, 3)
TYPES = [torch.bfloat16, torch.float16, torch.float32]


def case(rows, width, dtype):
    """A row that saturates, one of small numbers, one with NaN, and ordinary ones."""
    generator = torch.Generator().manual_seed(rows)
    x = 3 * torch.randn(rows, 2 * width, generator=generator)
    x[0] *= 40
    x[rows // 2] *= 2**-6
    x[rows - 1, width // 2] = torch.nan
    return x.to(dtype), torch.tensor([1.75]), torch.tensor([0.5])


def run(host, inputs, *, transpose, order=0):
    """Bytes, their transpose, 1 / scale and amax; and the launch."""
    run = host.run(H200, "swiglu_fp8", *inputs, transpose, order=order)
    launches = {(launch.grid, launch.block, launch.shared_bytes) for launch in run.launches}
    width, rows = inputs[0].size(-1) // 2, inputs[0].size(0)
    blocks = -(-rows // 128) * -(-width // 128)
    assert launches == ({((blocks, 1, 1), (256, 1, 1), 128 * 128)} if blocks else set())
    return *run.result, run.arguments[2]


def assert_is_the_definition(results, inputs, transpose):
    x, scale, amax = inputs
    expected = amax.clone()
    out, _, inverse = swiglu_fp8_reference(x, scale, expected, transpose)
    # The kernel's exponential is not torch's: a value between two of bf16 may fall on either.
    y, yt, got_inverse, got_amax = results
    numbers = [t.view(torch.float8_e4m3fn).float() for t in (y, out)]
    torch.testing.assert_close(*numbers, rtol=2**-3, atol=2**-9, equal_nan=True)
    assert (y != out).float().mean() < 0.02
    torch.testing.assert_close(got_amax, expected, rtol=2**-8, atol=0)
    assert torch.equal(got_inverse, inverse)
    assert torch.equal(yt, y.t()) if transpose else yt.shape == (0, 0)


@pytest.fixture(scope="module")
def host(host_code):
    return host_code("swiglu_fp8")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("transpose", [True, False], ids=["transposed", "plain"])
@pytest.mark.parametrize(("rows", "width"), CASES)
def test_the_bytes_are_the_definitions(host, rows, width, transpose, dtype):
    inputs = case(rows, width, dtype)
    assert_is_the_definition(run(host, inputs, transpose=transpose), inputs, transpose)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_inputs_may_begin_anywhere_and_have_strides(host, dtype):
    x, scale, amax = case(8, 24, dtype)
    for moved in (displaced(x), strided(x)):
        inputs = moved, scale, amax
        assert_is_the_definition(run(host, inputs, transpose=True), inputs, True)


@pytest.mark.parametrize("transpose", [True, False], ids=["transposed", "plain"])
@pytest.mark.parametrize("shape", [(0, 24), (3, 0)], ids=str)
def test_of_nothing_there_is_a_scale_alone(host, shape, transpose):
    x, scale, amax = torch.empty(shape[0], 2 * shape[1]), torch.tensor([1.75]), torch.tensor([0.5])
    results = run(host, (x, scale, amax), transpose=transpose)
    expected = *swiglu_fp8_reference(x, scale, amax, transpose), amax
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)
        assert got.shape == wanted.shape


@pytest.mark.parametrize(("rows", "width"), [(136, 144), (131, 37)])
def test_the_order_of_threads_changes_no_bit(host, rows, width):
    inputs = case(rows, width, torch.bfloat16)
    first, *others = (run(host, inputs, transpose=True, order=order) for order in ORDERS)
    for results in others:
        for got, expected in zip(results, first, strict=True):
            assert torch.equal(got, expected)


def test_amax_is_raised_and_never_lowered(host):
    x, scale, _ = case(8, 16, torch.bfloat16)
    for before in (0.0, 1e6, torch.inf):
        inputs = (x, scale, torch.tensor([before]))
        *_, amax = run(host, inputs, transpose=True, order=1)
        expected = inputs[2].clone()
        swiglu_fp8_reference(x, scale, expected, False)
        torch.testing.assert_close(amax, expected, rtol=2**-8, atol=0)
