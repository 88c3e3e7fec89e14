r"""A fused QKV projection taken apart: Q and K normalised and rotated, V as it is.

For every token and every head x of Q and K, of D numbers:

    r = 1 / sqrt(mean(x^2) + eps),   n = r * x
    y[2i]     = n[2i] cos(a_i) - n[2i+1] sin(a_i)
    y[2i+1]   = n[2i+1] cos(a_i) + n[2i] sin(a_i)      with a_i = angle i of the token's position

RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) without a weight, then rotary embedding (Su et
al. 2021, arXiv:2104.09864) of neighbouring pairs, as Llama 4 has them. A rotation R keeps products,
so that the gradient needs the result and not the input:

    d x = r * R^-1 (d y - y * mean(d y * y))

Kept for the backward are y, which attention keeps as well, and r: the projection's output itself
is free as soon as it has been taken apart. The arithmetic is fp32 for fp32, bf16 and fp16 tensors
and fp64 for fp64; what is stored is rounded once.

Dimensions: T tokens (S positions of B sequences, or packed documents), H query heads, G key and
value heads, D width of a head, R = D / 2 angles, P positions.
"""

from typing import Any

import torch
from torch import Tensor

import megatron_mlr1.ops.extension  # noqa: F401  registers the compiled rows

MAX_WIDTH = 256
"""The widest head that the op takes; flash attention has the same limit."""


def qk_norm_rope(
    qkv: Tensor, angles_PR: Tensor, *, num_groups: int, eps: float, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a fused QKV apart, with Q and K normalised and rotated.

    Args:
        qkv: [S, B, (H + 2G) * D], or [T, ..., (H + 2G) * D] with `bounds`; a group's heads of Q,
            its K and its V lie together, as the engine's `linear_qkv` gives them.
        angles_PR: fp32; row p has the angles of position p, at least as many rows as positions.
        num_groups: G.
        eps: added to the mean square of a head.
        bounds: int32, rising from 0 to T: where each document of a packed sequence begins, and the
            end of the last one. Positions count from the begin of a token's document; without
            bounds the first dimension counts them.

    Returns:
        Q [..., H, D], K and V [..., G, D], contiguous, in the type of `qkv`.
    """
    width = 2 * angles_PR.size(1)
    assert qkv.size(-1) % (num_groups * width) == 0, (
        f"{qkv.size(-1)} columns are not {num_groups} groups of heads of {width}"
    )
    assert width <= MAX_WIDTH, f"heads of {width} are wider than {MAX_WIDTH}"
    assert bounds is not None or angles_PR.size(0) >= qkv.size(0), (
        f"{qkv.size(0)} positions have {angles_PR.size(0)} rows of angles"
    )
    q, k, v, _ = _qk_norm_rope(qkv, angles_PR, bounds, num_groups, eps)
    return q, k, v


def qk_norm_rope_reference(
    qkv: Tensor, angles_PR: Tensor, bounds: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Define the op: Q, K, V, and r of the heads of Q and K, [..., H + G], fp32 or fp64."""
    parts = qkv.unflatten(-1, (num_groups, -1, 2 * angles_PR.size(1)))
    cos, sin = _cos_and_sin(qkv, angles_PR, bounds)
    heads, scales = [], []
    for part in (parts[..., :-2, :].flatten(-3, -2), parts[..., -2, :]):
        x = part.to(cos.dtype)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        heads.append(_rotate(x * scale, cos, sin).to(qkv.dtype))
        scales.append(scale.squeeze(-1))
    value = parts[..., -1, :].clone(memory_format=torch.contiguous_format)
    return heads[0], heads[1], value, torch.cat(scales, dim=-1)


def qk_norm_rope_backward_reference(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q: Tensor,
    k: Tensor,
    scales: Tensor,
    angles_PR: Tensor,
    bounds: Tensor | None,
) -> Tensor:
    """Define the gradient of `qkv` from those of Q, K and V and what the op gave."""
    cos, sin = _cos_and_sin(q.flatten(-2), angles_PR, bounds)
    num_groups = k.size(-2)
    grads = []
    for grad_out, out, scale in (
        (grad_q, q, scales[..., :-num_groups]),
        (grad_k, k, scales[..., -num_groups:]),
    ):
        dy, y = grad_out.to(cos.dtype), out.to(cos.dtype)
        dn = dy - y * (dy * y).mean(-1, keepdim=True)
        dx = scale.unsqueeze(-1) * _rotate(dn, cos, -sin)
        grads.append(dx.to(q.dtype).unflatten(-2, (num_groups, -1)))
    return torch.cat((*grads, grad_v.unsqueeze(-2)), dim=-2).flatten(-3)


def _cos_and_sin(rows: Tensor, angles_PR: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each token of `rows` [first dimension, ..., columns]: [first dimension, ..., 1, R]."""
    positions = torch.arange(rows.size(0), device=rows.device)
    if bounds is not None:
        documents = torch.searchsorted(bounds, positions.to(bounds.dtype), right=True) - 1
        positions = positions - bounds[documents]
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    angles = angles_PR[positions].to(dtype)
    angles = angles.view(rows.size(0), *[1] * (rows.dim() - 1), angles.size(1))
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


@torch.library.custom_op("mlr1::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    qkv: Tensor, angles: Tensor, bounds: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return qk_norm_rope_reference(qkv, angles, bounds, num_groups, eps)


@torch.library.custom_op("mlr1::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q: Tensor,
    k: Tensor,
    scales: Tensor,
    angles: Tensor,
    bounds: Tensor | None,
) -> Tensor:
    return qk_norm_rope_backward_reference(grad_q, grad_k, grad_v, q, k, scales, angles, bounds)


@_qk_norm_rope.register_fake
def _(
    qkv: Tensor, angles: Tensor, bounds: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = 2 * angles.size(1)
    num_heads = qkv.size(-1) // width - 2 * num_groups
    shape = qkv.shape[:-1]
    math = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return (
        qkv.new_empty((*shape, num_heads, width)),
        qkv.new_empty((*shape, num_groups, width)),
        qkv.new_empty((*shape, num_groups, width)),
        qkv.new_empty((*shape, num_heads + num_groups), dtype=math),
    )


@_qk_norm_rope_backward.register_fake
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q: Tensor,
    k: Tensor,
    scales: Tensor,
    angles: Tensor,
    bounds: Tensor | None,
) -> Tensor:
    return q.new_empty((*q.shape[:-2], (q.size(-2) + 2 * k.size(-2)) * q.size(-1)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, angles, bounds, _, _ = inputs
    q, k, _, scales = output
    ctx.save_for_backward(q, k, scales, angles, bounds)
    ctx.mark_non_differentiable(scales)


def _backward(
    ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grad_scales: Tensor
) -> tuple[Tensor, None, None, None, None]:
    grad_in: Tensor = _qk_norm_rope_backward(grad_q, grad_k, grad_v, *ctx.saved_tensors)
    return grad_in, None, None, None, None


_qk_norm_rope.register_autograd(_backward, setup_context=_setup_context)
