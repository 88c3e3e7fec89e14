"""The kernels that take a fused QKV apart, run on a CPU, against the definition."""

import pytest
import torch

from megatron_mlr1.ops.qk_norm_rope import (
    qk_norm_rope_backward_reference,
    qk_norm_rope_reference,
)

EPS = 1e-5
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 4e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
# Positions, sequences, query heads, groups, width of a head. 64 is the models'; 96 leaves lanes
# idle, 256 fills them several times, 6 and 250 hold no vector of 16 bytes in bf16. Eleven tokens
# are two blocks.
SHAPES = [
    (11, 1, 9, 3, 64),
    (3, 3, 4, 2, 16),
    (2, 1, 3, 1, 96),
    (2, 2, 2, 2, 256),
    (11, 1, 4, 2, 6),
    (2, 1, 2, 1, 250),
    (1, 1, 1, 1, 2),
]
NO_BOUNDS = torch.zeros(0, dtype=torch.int32)


def run(kernels, shape, dtype, *, bounds=NO_BOUNDS, order=0):
    """What both kernels give, and what they must: Q, K, V, scales, gradient of the fused QKV."""
    length, batch, heads, groups, width = shape
    generator = torch.Generator().manual_seed(0)

    def place(tensor):
        return kernels.place(tensor, alignment=16)

    def draw(*size):
        return place(torch.randn(length, batch, *size, generator=generator).to(dtype))

    positions = length if not bounds.numel() else int(bounds.diff().max())
    frequencies = 1 / 100 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = kernels.place(torch.outer(torch.arange(positions).float(), frequencies))
    qkv = draw((heads + 2 * groups) * width)
    grads = [draw(n, width) for n in (heads, groups, groups)]
    reference_bounds = bounds if bounds.numel() else None
    expected = qk_norm_rope_reference(qkv, angles, reference_bounds, groups, EPS)
    saved = [place(expected[i]) for i in (0, 1, 3)]
    gradient = qk_norm_rope_backward_reference(*grads, *saved, angles, reference_bounds)
    outs = [place(torch.full_like(t, torch.nan)) for t in (*expected, gradient)]
    sizes = [length * batch, batch, positions, groups, heads // groups, width, bounds.numel()]
    sizes, bounds = kernels.place(torch.tensor(sizes)), kernels.place(bounds)
    kernels.run("forward", sizes, qkv, angles, bounds, *outs[:4], EPS, dtype, order=order)
    kernels.run("backward", sizes, *grads, *saved, angles, bounds, outs[4], dtype, order=order)
    return outs, [*expected, gradient]


def assert_close(actual, expected, dtype):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_the_definition(emulated, shape, dtype):
    assert_close(*run(emulated("qk_norm_rope"), shape, dtype), dtype)


@pytest.mark.parametrize("bounds", [[0, 4, 5, 13], [0, 13], [0, 6, 6, 13, 13]], ids=str)
def test_positions_begin_anew_with_every_document(emulated, bounds):
    bounds = torch.tensor(bounds, dtype=torch.int32)
    shape = (13, 1, 4, 2, 16)
    got = run(emulated("qk_norm_rope"), shape, torch.float32, bounds=bounds)
    assert_close(*got, torch.float32)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_no_bit_depends_on_the_order_of_the_threads(emulated, shape):
    first, *others = (
        run(emulated("qk_norm_rope"), shape, torch.bfloat16, order=order)[0]
        for order in (0, 1, 2, 3)
    )
    for other in others:
        assert all(x.equal(y) for x, y in zip(first, other, strict=True))
