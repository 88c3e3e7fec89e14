"""A teacher's answers on their way to the loss: over the groups of processes, in their order.

One process of each tensor-parallel group asks. The others get what they need from it: hidden
states whole, or with sequence parallelism the rows of their part, and sparse targets, which are
small, whole. The teacher's head comes over the network once for the whole run and goes on from
there: each process keeps the rows of its own shard of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mlr1.engine.groups import Place
from megatron_mlr1.losses.distillation import HiddenTargets, Lesson, TeacherTargets
from megatron_mlr1.ops.hadamard import rotate
from megatron_mlr1.ops.linear_kl import Objective
from megatron_mlr1.ops.sparse_targets import SparseForm, SparseTargets
from megatron_mlr1.teacher.backend import TeacherBackend
from megatron_mlr1.teacher.forms import sparse_of, states_of
from megatron_mlr1.teacher.spec import Targets, TargetSpec, TeacherIdentity, layout

HEAD_ROWS = 16_384
"""Rows of the head that are asked for at a time: 128 MiB of a teacher of width 4,096."""

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """Makes the teacher's part of each micro-batch."""

    identity: TeacherIdentity
    spec: TargetSpec
    objective: Objective
    here: Place
    sequence_parallel: bool

    def make(self, targets: Sequence[Targets] | None, rows_BS: Tensor, alpha: float) -> Lesson:
        """Bring targets to all processes that need them, in the order of the hidden states.

        Args:
            targets: one for each sequence of the micro-batch; None where another process of the
                tensor-parallel group has them.
            rows_BS: which tokens of the micro-batch this process has, counted through it.
            alpha: share of the divergence.
        """
        order_SB = rows_BS.transpose(0, 1)
        if self.spec.is_sparse:
            found: TeacherTargets = self._sparse(targets, order_SB.reshape(-1))
        else:
            found = self._hidden(targets, order_SB)
        return Lesson(targets=found, alpha=alpha, objective=self.objective)

    def _hidden(self, targets: Sequence[Targets] | None, order_SB: Tensor) -> HiddenTargets:
        parts: dict[str, Tensor] = {}
        for array in layout(self.spec, self.identity, 1):
            tail = array.shape[1:]
            given = None if targets is None else _ordered(targets, array.name, order_SB)
            shape = (*order_SB.shape, *tail)
            dtype = self._dtype(array.dtype)
            parts[array.name] = self._shared(given, shape, dtype, order_SB.device)
        return HiddenTargets(hidden=parts["hidden"], scale=parts.get("scale"))

    def _dtype(self, dtype: np.dtype[Any]) -> torch.dtype:
        names = {"u2": torch.bfloat16, "f4": torch.float32, "i1": torch.int8}
        return names[dtype.str[1:]]

    def _sparse(self, targets: Sequence[Targets] | None, order_N: Tensor) -> SparseTargets:
        spec, device = self.spec, order_N.device
        num, columns = order_N.numel(), spec.k + spec.m
        kept = columns if spec.m else spec.k
        given: SparseTargets | None = None
        if targets is not None:
            arrays = {
                name: np.concatenate([one.arrays[name] for one in targets])
                for name in targets[0].arrays
            }
            given = sparse_of(Targets(spec, arrays), torch.device("cpu"))
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "ids": ((num, columns), torch.int64),
            "weights": ((num, kept), torch.float32),
            "tail": ((num,), torch.float32),
            "entropy": ((num,), torch.float32),
        }
        parts = {
            name: self._broadcast(
                None if given is None else _brought(getattr(given, name), device)[order_N],
                shape,
                dtype,
                device,
            )
            for name, (shape, dtype) in shapes.items()
        }
        form = SparseForm(top=spec.k, points=spec.m, temperature=spec.temperature)
        return SparseTargets(form=form, **parts)

    def _shared(
        self, given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Give each process of the tensor-parallel group its part."""
        group = self.here.tensor_group
        if not self.sequence_parallel or group.size() == 1:
            return self._broadcast(given, shape, dtype, device)
        part = torch.empty((shape[0] // group.size(), *shape[1:]), dtype=dtype, device=device)
        pieces = None if given is None else [_bytes(one) for one in given.chunk(group.size())]
        dist.scatter(_bytes(part), pieces, src=self.here.tensor_source, group=group)
        return part

    def _broadcast(
        self, given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        whole = torch.empty(shape, dtype=dtype, device=device) if given is None else given
        if self.here.tensor_group.size() > 1:
            whole = whole.contiguous()
            dist.broadcast(_bytes(whole), src=self.here.tensor_source, group=self.here.tensor_group)
        return whole


def _ordered(targets: Sequence[Targets], name: str, order_SB: Tensor) -> Tensor:
    """Bring one array of all sequences to the device, and its rows into the order of the tokens."""
    device = order_SB.device
    states = [states_of(one.arrays[name], torch.device("cpu")) for one in targets]
    length = states[0].size(0)
    whole = torch.empty(
        (len(states) * length, *states[0].shape[1:]), dtype=states[0].dtype, device=device
    )
    for number, one in enumerate(states):
        whole[number * length : (number + 1) * length].copy_(one, non_blocking=True)
    return whole.index_select(0, order_SB.reshape(-1)).view(*order_SB.shape, *whole.shape[1:])


def _brought(whole: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for what it does: out of page-locked memory."""
    on_host = whole.pin_memory() if device.type == "cuda" else whole
    return on_host.to(device, non_blocking=True)


def _bytes(tensor: Tensor) -> Tensor:
    """See a tensor as bytes, which every backend of torch.distributed carries."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def head_shard(
    backend: TeacherBackend | None,
    identity: TeacherIdentity,
    spec: TargetSpec,
    here: Place,
    num_ids: int,
    rows: int,
    device: torch.device,
) -> Tensor:
    """Give this process's rows of the teacher's head, [ids of its shard, d]; all processes call.

    Args:
        backend: who is asked; None in a process that asks nobody.
        identity: of the teacher.
        spec: of the targets: an int8 form has its head rotated.
        here: a process of the last stage.
        num_ids: ids that both vocabularies have.
        rows: rows of the student's head in each process.
        device: where the head is to lie.

    Raises:
        TeacherError: the teacher does not give its head.
    """
    copies, mine = here.replica_group, here.tensor_rank
    kept: Tensor | None = None
    for rank in range(here.tensor_group.size()):
        asks = copies.rank() == 0 and mine == 0
        if not asks and mine != rank:
            continue
        first, last = (min(edge, num_ids) for edge in (rank * rows, (rank + 1) * rows))
        shape = (last - first, identity.hidden_size)
        shard = torch.empty(shape, dtype=TORCH_DTYPES[identity.dtype], device=device)
        if asks:
            assert backend is not None, "the first process of a tensor-parallel group asks"
            _fill(shard, backend, first)
        if copies.rank() == 0:
            _pass_on(shard, rank, here)
        if mine == rank:
            if copies.size() > 1 and shard.numel():
                dist.broadcast(_bytes(shard), dist.get_global_rank(copies, 0), copies)
            kept = shard
    assert kept is not None, "each rank has its turn"
    return rotate(kept, spec.seed) if spec.form == "hidden_int8" else kept


def _fill(shard: Tensor, backend: TeacherBackend, first: int) -> None:
    """Ask for the rows of a shard, some at a time."""
    for begin in range(0, shard.size(0), HEAD_ROWS):
        end = min(begin + HEAD_ROWS, shard.size(0))
        part = states_of(backend.head(first + begin, first + end), torch.device("cpu"))
        shard[begin:end].copy_(part)


def _pass_on(shard: Tensor, rank: int, here: Place) -> None:
    """Bring a shard from the process that asked to the one that keeps it."""
    if rank == 0 or not shard.numel():
        return
    if here.tensor_rank == 0:
        dist.send(_bytes(shard), dist.get_global_rank(here.tensor_group, rank), here.tensor_group)
    elif here.tensor_rank == rank:
        dist.recv(_bytes(shard), here.tensor_source, here.tensor_group)
