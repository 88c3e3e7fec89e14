"""The kernel of SwiGLU with FP8 output, run on a CPU, against the definition."""

import pytest
import torch

from megatron_mlr1.ops.swiglu_fp8 import swiglu_fp8_reference

# Less than a tile, tiles and a part of one in both directions, and shapes that no vector divides.
SHAPES = {"vectors": [(8, 24), (136, 144), (256, 128)], "elements": [(131, 37), (1, 130), (3, 1)]}
CASES = [(*shape, moved == "vectors") for moved, shapes in SHAPES.items() for shape in shapes]
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


def run(kernels, inputs, *, transpose, whole, order):
    alignment = 16 if whole else None
    x, scale, amax = (kernels.place(t, alignment=alignment) for t in inputs)
    rows, width = x.size(0), x.size(1) // 2
    y, yt = (
        kernels.place(torch.full(shape, 0xAA, dtype=torch.uint8), alignment=alignment)
        for shape in ((rows, width), (width, rows))
    )
    inverse = kernels.place(torch.tensor([torch.nan]))
    sizes = (rows, width, x.dtype, transpose, whole)
    kernels.run("swiglu_fp8", x, scale, y, yt, amax, inverse, *sizes, order=order)
    return y, yt, inverse, amax


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
    assert torch.equal(yt, y.t()) if transpose else bool((yt == 0xAA).all())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("transpose", [True, False], ids=["transposed", "plain"])
@pytest.mark.parametrize(("rows", "width", "whole"), CASES)
def test_the_kernel_matches_the_definition(emulated, rows, width, whole, transpose, dtype):
    inputs = case(rows, width, dtype)
    results = run(emulated("swiglu_fp8"), inputs, transpose=transpose, whole=whole, order=0)
    assert_is_the_definition(results, inputs, transpose)


@pytest.mark.parametrize(("rows", "width", "whole"), [(136, 144, True), (131, 37, False)])
def test_the_order_of_threads_changes_no_bit(emulated, rows, width, whole):
    inputs = case(rows, width, torch.bfloat16)
    first, *others = (
        run(emulated("swiglu_fp8"), inputs, transpose=True, whole=whole, order=order)
        for order in ORDERS
    )
    for results in others:
        for got, expected in zip(results, first, strict=True):
            assert torch.equal(got, expected)


def test_amax_is_raised_and_never_lowered(emulated):
    x, scale, _ = case(8, 16, torch.bfloat16)
    for before in (0.0, 1e6, torch.inf):
        inputs = (x, scale, torch.tensor([before]))
        *_, amax = run(emulated("swiglu_fp8"), inputs, transpose=True, whole=True, order=1)
        expected = inputs[2].clone()
        swiglu_fp8_reference(x, scale, expected, False)
        torch.testing.assert_close(amax, expected, rtol=2**-8, atol=0)
