r"""SwiGLU on a fused projection: out = silu(gate) * up.

    out       = gate * s * up                  with s = sigmoid(gate)
    d gate    = d out * up * s * (1 + gate * (1 - s))
    d up      = d out * gate * s

(Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.) The arithmetic is fp32 for
fp32, bf16 and fp16 tensors and fp64 for fp64; what is stored is rounded once. Forward and backward
each read and write every number once; only the input is kept for the backward.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

import megatron_mlr1.ops.extension  # noqa: F401  registers the compiled rows

Kernel = Literal["reference", "mlr1", "liger"]
"""Implementations, see `swiglu`."""


def swiglu(gate_up: Tensor, *, kernel: Kernel) -> Tensor:
    """Compute silu(gate) * up.

    Args:
        gate_up: [..., 2F], laid out [gate | up], on any device.
        kernel: "reference" is plain torch with torch's own gradient; "mlr1" is the op, whose
            compiled row serves the device where there is one and whose definition serves it else;
            "liger" is Liger-Kernel's function, which needs CUDA, copies gate and up apart, and
            takes the gradient in those copies, once.

    Returns:
        [..., F] in the type of `gate_up`.
    """
    assert gate_up.shape[-1] % 2 == 0, f"[gate | up] has an odd width: {tuple(gate_up.shape)}"
    if kernel == "reference":
        return swiglu_reference(gate_up)
    if kernel == "liger":
        return _liger(gate_up)
    out: Tensor = _swiglu(gate_up)
    return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Define the op: serve every device without a faster row, and judge the faster rows."""
    gate, up = gate_up.to(_math_dtype(gate_up)).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward_reference(grad_out: Tensor, gate_up: Tensor) -> Tensor:
    """Define the gradient: [..., F] and [..., 2F] to [..., 2F]."""
    dtype = _math_dtype(gate_up)
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    grad = grad_out.to(dtype)
    s = gate.sigmoid()
    grad_gate = grad * up * s * (1 + gate * (1 - s))
    return torch.cat((grad_gate, grad * gate * s), dim=-1).to(gate_up.dtype)


def _liger(gate_up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    # Of two dimensions: its backward fails for more.
    rows: Tensor = LigerFusedGateUpSiLUMulFunction.apply(gate_up.reshape(-1, gate_up.size(-1)))
    return rows.view(*gate_up.shape[:-1], rows.size(-1))


def _math_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.library.custom_op("mlr1::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    return swiglu_reference(gate_up)


@torch.library.custom_op("mlr1::swiglu_backward", mutates_args=())
def _swiglu_backward(grad_out: Tensor, gate_up: Tensor) -> Tensor:
    return swiglu_backward_reference(grad_out, gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@_swiglu_backward.register_fake
def _(grad_out: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    grad_in: Tensor = _swiglu_backward(grad_out, gate_up)
    return grad_in


_swiglu.register_autograd(_backward, setup_context=_setup_context)
