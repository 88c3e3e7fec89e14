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


def logits_into(out_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
    """Write hidden @ weight^T.

    Args:
        out_CV: where to, in the wide type.
        hidden_CD: rows of hidden states, in the type of `weight_VD`.
        weight_VD: the head.
    """
    if _multiplies_narrow(weight_VD):
        torch.ops.aten.mm.dtype_out(hidden_CD, weight_VD.t(), out_CV.dtype, out=out_CV)
        return
    hidden = hidden_CD.to(out_CV.dtype)
    for begin, block_BD in _blocks(weight_VD, out_CV.dtype):
        torch.mm(hidden, block_BD.t(), out=out_CV[:, begin : begin + block_BD.size(0)])


def back_to_hidden(grad_CV: Tensor, weight_VD: Tensor) -> Tensor:
    """Give gradient @ weight in the wide type: the gradient of the hidden states, [C, D]."""
    if _multiplies_narrow(weight_VD):
        return torch.mm(grad_CV.to(weight_VD.dtype), weight_VD, out_dtype=grad_CV.dtype)
    out_CD = grad_CV.new_zeros(grad_CV.size(0), weight_VD.size(1))
    for begin, block_BD in _blocks(weight_VD, grad_CV.dtype):
        out_CD.addmm_(grad_CV[:, begin : begin + block_BD.size(0)], block_BD)
    return out_CD


def add_to_weight(sum_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add gradient^T @ hidden, the gradient of the head, to `sum_VD` (wide type).

    On CUDA the gradient of the logits is rounded to the type of the hidden states, so that tensor
    cores multiply; on a CPU nothing is rounded.
    """
    if _multiplies_narrow(hidden_CD):
        narrow = grad_CV.to(hidden_CD.dtype).t()
        torch.ops.aten.addmm.dtype_out(sum_VD, narrow, hidden_CD, sum_VD.dtype, out=sum_VD)
    else:
        sum_VD.addmm_(grad_CV.t(), hidden_CD.to(sum_VD.dtype))


def _multiplies_narrow(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def _blocks(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows): the weight as it is where it is wide, else widened bit by bit."""
    if weight_VD.dtype == dtype:
        yield 0, weight_VD
        return
    for begin in range(0, weight_VD.size(0), BLOCK_ROWS):
        yield begin, weight_VD[begin : begin + BLOCK_ROWS].to(dtype)
