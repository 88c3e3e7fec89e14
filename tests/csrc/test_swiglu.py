"""The kernels of SwiGLU, run on a CPU, against the definition."""

import pytest
import torch

from megatron_mlr1.ops.swiglu import swiglu_backward_reference, swiglu_reference

TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}
# 19 rows: a grid of two blocks of eight rows strides over them. 272 columns leave lanes idle.
SHAPES = {"vectors": [(19, 272), (3, 16)], "elements": [(19, 37), (1, 1)]}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vectors"),
    [(*shape, moved == "vectors") for moved, shapes in SHAPES.items() for shape in shapes],
)
def test_kernels_match_the_definition(emulated, rows, width, vectors, dtype):
    kernels = emulated("swiglu")
    alignment = 16 if vectors else None
    generator = torch.Generator().manual_seed(0)
    x = kernels.place(
        6 * torch.randn(rows, 2 * width, generator=generator).to(dtype), alignment=alignment
    )
    dy = torch.randn(rows, width, generator=generator).to(dtype)
    dy = kernels.place(dy, alignment=alignment)
    y, dx = (
        kernels.place(t.fill_(torch.nan), alignment=alignment) for t in (dy.clone(), x.clone())
    )
    kernels.run("forward", x, y, rows, width, dtype, vectors)
    kernels.run("backward", dy, x, dx, rows, width, dtype, vectors, order=2)
    close = {"rtol": TOLERANCE[dtype], "atol": 2**-46 if dtype == torch.float64 else 2**-19}
    torch.testing.assert_close(y.double(), swiglu_reference(x.double()), **close)
    expected = swiglu_backward_reference(dy.double(), x.double())
    torch.testing.assert_close(dx.double(), expected, **close)
