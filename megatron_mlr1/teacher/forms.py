"""From a teacher's states to what is sent, and from what was received to what a loss takes.

Shapes: R rows, d hidden size, V vocabulary, k and m ids of a sparse form.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mlr1.ops.hadamard import quantise, rotate
from megatron_mlr1.ops.linear_kl import Head
from megatron_mlr1.ops.sparse_targets import (
    SparseForm,
    SparseTargets,
    offsets,
    sparse_targets_of_head,
)
from megatron_mlr1.teacher.spec import Targets, TargetSpec


def arrays_of(
    hidden_RD: Tensor, head_VD: Tensor, spec: TargetSpec, key: bytes
) -> dict[str, NDArray[Any]]:
    """Make the arrays of `spec.layout` from all rows of one request.

    The head is computed in chunks of rows: logits of all rows never exist at once.

    Args:
        hidden_RD: states after the final norm.
        head_VD: of the same type and device.
        spec: the form.
        key: content key of the request, 16 bytes, for the draws of `hybrid`.
    """
    if spec.form == "hidden":
        return {"hidden": as_numpy(hidden_RD)}
    if spec.form == "hidden_int8":
        # fp32: the rotated numbers must not be rounded twice.
        levels_RD, scale_R = quantise(rotate(hidden_RD.float(), spec.seed))
        return {"hidden": as_numpy(levels_RD), "scale": as_numpy(scale_R)}
    offset_R = offsets(key, spec.seed, 0, hidden_RD.size(0)).to(hidden_RD.device)
    sparse = sparse_targets_of_head(
        Head(hidden=hidden_RD, weight=head_VD), offset_R, _sparse_form(spec)
    )
    # The draws of a row all have one weight.
    tail_R = sparse.weights[:, -1] if spec.m else sparse.tail
    return {
        "ids": as_numpy(sparse.ids.int()),
        "weights": as_numpy(sparse.weights[:, : spec.k].float()),
        "tail": as_numpy(tail_R.float()),
        "entropy": as_numpy(sparse.entropy.float()),
    }


def sparse_of(targets: Targets, device: torch.device) -> SparseTargets:
    """Give the tensors that `arrays_of` was made from, in fp32, on a device.

    Args:
        targets: of a sparse form.
        device: where the loss is computed.
    """
    spec = targets.spec
    ids, weights_RK, tail_R, entropy_R = (
        torch.from_numpy(np.array(targets.arrays[name])).to(device)
        for name in ("ids", "weights", "tail", "entropy")
    )
    if spec.m:
        draws_RM = tail_R[:, None].expand(-1, spec.m)
        weights_RK, tail_R = torch.cat([weights_RK, draws_RM], 1), torch.zeros_like(tail_R)
    return SparseTargets(
        form=_sparse_form(spec),
        ids=ids.long(),
        weights=weights_RK,
        tail=tail_R,
        entropy=entropy_R,
    )


def states_of(array: NDArray[Any], device: torch.device) -> Tensor:
    """Give states or rows of a head as a tensor; 16 bits stand for bfloat16.

    Args:
        array: `hidden` of targets, of any form, or rows of a head; read-only is allowed.
        device: where it is wanted.
    """
    tensor = torch.from_numpy(array if array.flags.writeable else np.array(array))
    if tensor.dtype == torch.uint16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device)


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """Give a tensor's numbers on the host; bfloat16 as its 16 bits."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: NDArray[Any] = tensor.contiguous().cpu().numpy()
    return array


def _sparse_form(spec: TargetSpec) -> SparseForm:
    return SparseForm(top=spec.k, points=spec.m, temperature=spec.temperature)
