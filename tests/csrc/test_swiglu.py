"""csrc/swiglu.cu, run whole on a CPU, against the definition."""

from dataclasses import replace

import pytest
import torch

from megatron_mlr1.ops.swiglu import swiglu_backward_reference, swiglu_reference
from tests.csrc.devices import H200, displaced, strided

TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}
# The models' widths and odd ones; 272 and 37 columns leave lanes idle.
SHAPES = [(3, 2048), (2, 4096), (2, 6144), (19, 272), (3, 16), (19, 37), (1, 1)]


@pytest.fixture(scope="module")
def host(host_code):
    return host_code("swiglu")


def drawn(rows, width, dtype):
    """[gate | up], and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    x = 6 * torch.randn(rows, 2 * width, generator=generator)
    return x.to(dtype), torch.randn(rows, width, generator=generator).to(dtype)


def run_both(host, x, dy, *, device=H200, order=0):
    """Run forward and backward, compare with the definition, give the two grids."""
    runs = (
        host.run(device, "swiglu", x, order=order),
        host.run(device, "swiglu_backward", dy, x, order=order),
    )
    expected = swiglu_reference(x.double()), swiglu_backward_reference(dy.double(), x.double())
    close = {"rtol": TOLERANCE[x.dtype], "atol": 2**-46 if x.dtype == torch.float64 else 2**-19}
    for run, wanted in zip(runs, expected, strict=True):
        assert run.result.dtype == x.dtype
        assert run.result.is_contiguous()
        torch.testing.assert_close(run.result.double(), wanted, **close)
    launches = [launch for run in runs for launch in run.launches]
    assert all(launch.block == (32, 8, 1) for launch in launches)
    return [launch.grid for launch in launches]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_results_are_the_definitions(host, rows, width, dtype):
    grids = run_both(host, *drawn(rows, width, dtype), order=2)
    vector = 16 // dtype.itemsize if width % 16 == 0 else 1
    assert grids == [(-(-width // (32 * vector)), -(-rows // 8), 1)] * 2


@pytest.mark.parametrize("width", [64, 37])
def test_a_grid_that_is_full_strides_over_the_rows(host, width):
    # A device of one multiprocessor wants 256 blocks; vectors of 64 columns and less are one block
    # a row, so that the last of 2,051 rows are second ones.
    one = replace(H200, multiprocessors=1, largest_cluster=1)
    blocks = 1 if width == 64 else 2
    grids = run_both(host, *drawn(2_051, width, torch.bfloat16), device=one)
    assert grids == [(blocks, 256 // blocks, 1)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_that_begin_anywhere_are_moved_one_by_one(host, dtype):
    x, dy = drawn(3, 64, dtype)
    scalar = (2, 1, 1)
    assert run_both(host, displaced(x), dy)[0] == scalar
    assert run_both(host, x, displaced(dy))[1] == scalar


def test_tensors_may_have_strides_and_any_leading_dimensions(host):
    x, dy = (each.view(3, 2, 5, -1) for each in drawn(30, 64, torch.float32))
    run_both(host, strided(x), dy.transpose(0, 1).contiguous().transpose(0, 1))
    run_both(host, x, torch.ones(()).expand(3, 2, 5, 64))
    run_both(host, *(each[0, 0, 0] for each in (x, dy)))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 64)], ids=str)
def test_nothing_is_launched_for_nothing(host, shape):
    x = torch.empty(*shape[:-1], 2 * shape[-1])
    assert run_both(host, x, torch.empty(shape)) == []
