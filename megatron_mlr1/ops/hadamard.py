r"""Hidden states in one byte a number: a random rotation, then int8 with one scale a token.

A few channels of a language model's hidden states are many times larger than the rest, so that one
scale a token leaves the rest few levels. A rotation R spreads them: R = H D, where D flips signs
at random and H is the Hadamard matrix over sqrt(its size). (QuaRot: Ashkboos et al. 2024,
arXiv:2404.00456.) R is orthogonal, so it costs the receiver nothing:

    logits = W h = (W R^T) (R h)        and a row w of W R^T is R w

The sender sends R h as int8 with its scale; the receiver keeps the folded head W R^T once, takes
the int8 numbers, which bf16 holds exactly, through the product, and applies the scale after it.
A width that is no power of two is rotated in blocks of the largest power of two that divides it.
"""

import numpy as np
import torch
from torch import Tensor

from megatron_mlr1.ops.wide_matmul import wide_dtype

LEVELS = 127
"""Largest int8 that is used; -128 is not."""

ROWS_AT_ONCE = 8192
"""Rows that are rotated in the wide type at the same time."""


def signs(width: int, seed: int) -> Tensor:
    """Give the diagonal of D, [width] of -1 and 1 in fp64 on the CPU: the same on any machine."""
    words = np.random.Philox(key=seed).random_raw(width)
    return torch.from_numpy(1.0 - 2.0 * (words >> np.uint64(63)).astype(np.float64))


def rotate(x_ND: Tensor, seed: int) -> Tensor:
    """Give R x for each row x, in the type of `x_ND`.

    On hidden states this is what the sender does; on the rows of a head it is the fold W R^T.

    Args:
        x_ND: any floating type; only read. The arithmetic is fp32 (fp64 for fp64), rounded once.
        seed: names the rotation; sender and receiver must use the same.
    """
    dtype = wide_dtype(x_ND.dtype)
    sign_D = signs(x_ND.size(1), seed).to(x_ND.device, dtype)
    out_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    for begin in range(0, x_ND.size(0), ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        out_ND[rows] = _hadamard(x_ND[rows].to(dtype) * sign_D)
    return out_ND


def _hadamard(x_BD: Tensor) -> Tensor:
    """Multiply each block of each row by the Hadamard matrix over sqrt(size), by butterflies."""
    width = x_BD.size(1)
    size = width & -width
    step = 1
    while step < size:
        pair = x_BD.view(-1, width // (2 * step), 2, step)
        upper, lower = pair[:, :, 0], pair[:, :, 1]
        x_BD = torch.stack((upper + lower, upper - lower), 2).view(-1, width)
        step *= 2
    out: Tensor = x_BD * size**-0.5
    return out


def quantise(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 with a scale of its own.

    Returns:
        int8 [N, D] and fp32 [N] with x close to int8 * scale; a row of zeros has the scale 0.
    """
    x = x_ND.to(wide_dtype(x_ND.dtype))
    scale_N = x.abs().amax(1) / LEVELS
    per_level_N = torch.where(scale_N > 0, 1 / scale_N, 0)
    levels = (x * per_level_N[:, None]).round_().clamp_(-LEVELS, LEVELS)
    return levels.to(torch.int8), scale_N.float()
