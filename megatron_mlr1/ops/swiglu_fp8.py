r"""SwiGLU whose result is FP8 (E4M3), with its scale: what a matrix product in FP8 takes as it is.

    stored = round(silu(gate) * up)         to the type of [gate | up], as `ops.swiglu` stores it
    out    = E4M3(stored * scale)           to the nearest, ties to even, at most 448
    amax   = max(amax, max |stored|)        of the numbers; NaN does not count, and stays NaN in out

(E4M3: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433, table 1.) With
delayed scaling, `scale` comes from the amax of earlier steps. The product is rounded to its stored
type before it is quantised, although fp32 is at hand: so the bytes are those of `ops.swiglu` and
then a cast, and a step may go either way, a recomputed one too, without a difference of one bit.

Everything is read once and written once. A maximum does not depend on an order: equal inputs give
equal bits. The gradient is that of `ops.swiglu`, since quantisation passes gradients on unchanged;
the op itself has none.
"""

import torch
from torch import Tensor

import megatron_mlr1.ops.extension  # noqa: F401  registers the compiled rows
from megatron_mlr1.ops.swiglu import swiglu_reference

LARGEST = 448.0
NOT_A_NUMBER = 0x7F
"""Of E4M3: the largest number, and the bits that all rows write for NaN."""


def swiglu_fp8(
    gate_up: Tensor, scale: Tensor, amax: Tensor, *, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute silu(gate) * up in E4M3.

    Args:
        gate_up: [..., 2F], laid out [gate | up], fp32, bf16 or fp16, on any device.
        scale: fp32, one element: what is multiplied before rounding.
        amax: fp32, one element, not negative; raised to the largest magnitude before scaling.
        transpose: whether the columnwise copy is made, too.

    Returns:
        out: [..., F] uint8, the bits of E4M3.
        out_t: [F, T] uint8, `out` as [T, F] transposed; [0, 0] where it is not asked for.
        scale_inv: 1 / scale, in the shape of `scale`.
    """
    assert gate_up.shape[-1] % 2 == 0, f"[gate | up] has an odd width: {tuple(gate_up.shape)}"
    assert gate_up.dtype in (torch.float32, torch.bfloat16, torch.float16), (
        f"no E4M3 of {gate_up.dtype}"
    )
    for one in (scale, amax):
        assert one.dtype == torch.float32, f"scale and amax are fp32, not {one.dtype}"
        assert one.numel() == 1, f"scale and amax have one element, not {tuple(one.shape)}"
    out: tuple[Tensor, Tensor, Tensor] = _swiglu_fp8(gate_up, scale, amax, transpose)
    return out


def swiglu_fp8_reference(
    gate_up: Tensor, scale: Tensor, amax: Tensor, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Define the op: serve every device without a faster row, and judge the faster rows."""
    stored = swiglu_reference(gate_up).float()
    if stored.numel():
        magnitude = torch.where(stored.isnan(), 0.0, stored.abs())
        amax.copy_(torch.maximum(amax, magnitude.amax()))
    # The clamp is the saturation: torch's cast to E4M3 gives NaN beyond the largest.
    scaled = (stored * scale.reshape(())).clamp(-LARGEST, LARGEST)
    out = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    out.masked_fill_(scaled.isnan(), NOT_A_NUMBER)
    return out, _turned(out, transpose), scale.reciprocal()


def _turned(out: Tensor, transpose: bool) -> Tensor:
    if not transpose:
        return out.new_empty(0, 0)
    width = out.shape[-1]
    rows = out.reshape(out.numel() // max(width, 1), width)
    # A copy even where the transpose is contiguous already: outputs of an op share no memory.
    return rows.t().clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("mlr1::swiglu_fp8", mutates_args=("amax",))
def _swiglu_fp8(
    gate_up: Tensor, scale: Tensor, amax: Tensor, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return swiglu_fp8_reference(gate_up, scale, amax, transpose)


@_swiglu_fp8.register_fake
def _(
    gate_up: Tensor, scale: Tensor, amax: Tensor, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width), dtype=torch.uint8)
    turned = (width, out.numel() // max(width, 1)) if transpose else (0, 0)
    return out, out.new_empty(turned), torch.empty_like(scale)
