"""Matrix products whose sums are kept in fp32 (fp64 for fp64), also where the factors are bf16.

A plain product of bf16 matrices rounds its result to bf16, which costs a softmax over 128k logits
about 1e-4 nats. On CUDA cuBLAS multiplies bf16 and hands out its fp32 sums. A CPU has no such
product, so the factors are widened there, the weight a block of rows at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 8192
"""Rows of a weight that are widened at once on a CPU."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the type of sums over products of this type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(logits_dtype: torch.dtype, hidden: Tensor) -> torch.dtype:
    """Name the type in which a gradient of logits enters both products of the backward.

    On CUDA it is that of the hidden states, so that tensor cores multiply; on a CPU it is that of
    the logits, so that nothing more is rounded.
    """
    return hidden.dtype if _multiplies_narrow(hidden) else logits_dtype


def logits_into(out_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
    """Write hidden @ weight^T, rounded at the end alone.

    Args:
        out_CV: where to, in the wide type or a narrower one.
        hidden_CD: rows of hidden states, in the type of `weight_VD`.
        weight_VD: the head.
    """
    if _multiplies_narrow(weight_VD):
        if out_CV.dtype == weight_VD.dtype:
            torch.mm(hidden_CD, weight_VD.t(), out=out_CV)
        else:
            torch.ops.aten.mm.dtype_out(hidden_CD, weight_VD.t(), out_CV.dtype, out=out_CV)
        return
    wide = wide_dtype(weight_VD.dtype)
    hidden = hidden_CD.to(wide)
    for begin, block_BD in _blocks(weight_VD, wide):
        part_CB = out_CV[:, begin : begin + block_BD.size(0)]
        if out_CV.dtype == wide:
            torch.mm(hidden, block_BD.t(), out=part_CB)
        else:
            part_CB.copy_(hidden @ block_BD.t())


def back_to_hidden(grad_CV: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Give gradient @ weight, the gradient of the hidden states, [C, D].

    Args:
        grad_CV: in `gradient_dtype`; rows may lie apart.
        weight_VD: the head.
        dtype: of the result: the wide one, or the weight's.
    """
    if _multiplies_narrow(weight_VD):
        if dtype == weight_VD.dtype:
            return torch.mm(grad_CV, weight_VD)
        return torch.mm(grad_CV, weight_VD, out_dtype=dtype)
    wide = wide_dtype(weight_VD.dtype)
    out_CD = grad_CV.new_zeros(grad_CV.size(0), weight_VD.size(1), dtype=wide)
    for begin, block_BD in _blocks(weight_VD, wide):
        out_CD.addmm_(grad_CV[:, begin : begin + block_BD.size(0)].to(wide), block_BD)
    return out_CD.to(dtype)


def add_to_weight(sum_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add gradient^T @ hidden, the gradient of the head, to `sum_VD` (wide type).

    Args:
        sum_VD: where to.
        grad_CV: in `gradient_dtype`; rows may lie apart.
        hidden_CD: hidden states.
    """
    if _multiplies_narrow(hidden_CD):
        torch.ops.aten.addmm.dtype_out(sum_VD, grad_CV.t(), hidden_CD, sum_VD.dtype, out=sum_VD)
    else:
        sum_VD.addmm_(grad_CV.to(sum_VD.dtype).t(), hidden_CD.to(sum_VD.dtype))


def _multiplies_narrow(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def _blocks(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows): the weight as it is where it is wide, else widened bit by bit."""
    if weight_VD.dtype == dtype:
        yield 0, weight_VD
        return
    for begin in range(0, weight_VD.size(0), BLOCK_ROWS):
        yield begin, weight_VD[begin : begin + BLOCK_ROWS].to(dtype)
