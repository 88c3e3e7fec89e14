"""Devices that tests describe, and the host code of `csrc/*.cu`, which runs on a CPU for them.

The functions of a `.cu` are the ops `torch.ops.mlr1_emulated.<name>`, with the schema that the op
has in Python. They take tensors of a CPU, and every kernel that they launch is executed there,
thread by thread.
"""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KIB = 1024
_OPS = torch.library.Library("mlr1_emulated", "DEF")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What a device grants, in the order of `DescribedDevice` in cuda_host/cuda_runtime.h.

    Numbers: CUDA C++ Programming Guide, "Compute Capabilities", technical specifications;
    multiprocessors: the vendor's data sheets.
    """

    multiprocessors: int
    largest_cluster: int
    """Blocks; 1 where there are no clusters."""
    shared_of_block: int
    """Bytes that a kernel may ask for."""
    shared_of_multiprocessor: int
    """Bytes, of which 1 KiB of each block is the runtime's."""
    threads_of_multiprocessor: int
    blocks_of_multiprocessor: int
    code: int
    """Version of the PTX that kernels come from: 90 of sm_90a, 80 where a driver translates."""


H200 = Device(
    multiprocessors=132,
    largest_cluster=8,
    shared_of_block=227 * KIB,
    shared_of_multiprocessor=228 * KIB,
    threads_of_multiprocessor=2048,
    blocks_of_multiprocessor=32,
    code=90,
)
A100 = Device(
    multiprocessors=108,
    largest_cluster=1,
    shared_of_block=163 * KIB,
    shared_of_multiprocessor=164 * KIB,
    threads_of_multiprocessor=2048,
    blocks_of_multiprocessor=32,
    code=80,
)
L40S = Device(
    multiprocessors=142,
    largest_cluster=1,
    shared_of_block=99 * KIB,
    shared_of_multiprocessor=100 * KIB,
    threads_of_multiprocessor=1536,
    blocks_of_multiprocessor=24,
    code=80,
)
OLD_CODE = replace(H200, code=80)
"""A new device whose driver translated the code of an older one, which knows no clusters."""

SLICE = replace(H200, multiprocessors=4, largest_cluster=4)
"""A part of a device, too small for the largest clusters."""

DEVICES = {
    "H200": H200,
    "A100": A100,
    "L40S": L40S,
    "old code": OLD_CODE,
    "slice": SLICE,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch of a kernel."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a call of an op gave, did to its arguments, and launched."""

    result: Any
    arguments: tuple[Any, ...]
    launches: list[Launch]


class HostCode:
    """The ops of one `.cu`, as the fixture `host_code` gives them.

    Args:
        library: what was built of it.
        ops: their names in `torch.ops.mlr1`.
    """

    def __init__(self, library: Path, ops: Iterable[str] = ()) -> None:
        for name in ops:
            schema = getattr(torch.ops.mlr1, name).default._schema
            _OPS.define(str(schema).removeprefix("mlr1::"))
        self._library = ctypes.CDLL(str(library))
        self._library.mlr1_end.restype = ctypes.c_int64

    @contextmanager
    def on(self, device: Device, *, order: int = 0) -> Iterator[list[Launch]]:
        """Run ops on a device; every tensor that is made meanwhile lies between fences.

        Args:
            device: what it is like.
            order: in which threads run: 0 first things first, 1 last things first, else the seed
                of a random order.

        Yields:
            The launches, which are known when the block ends; at most 16.
        """
        numbers = (*astuple(device), order)
        launches: list[Launch] = []
        self._library.mlr1_begin((ctypes.c_int64 * len(numbers))(*numbers))
        room = 16
        written = (ctypes.c_int64 * (8 * room))()
        try:
            yield launches
        finally:
            count = self._library.mlr1_end(written, ctypes.c_int64(room))
            assert count <= room, f"{count} launches"
        for begin in range(0, 8 * count, 8):
            *extents, cluster, shared_bytes = written[begin : begin + 8]
            launches.append(
                Launch(
                    grid=tuple(extents[:3]),
                    block=tuple(extents[3:]),
                    cluster=cluster,
                    shared_bytes=shared_bytes,
                )
            )

    def run(self, device: Device, name: str, *arguments: Any, order: int = 0) -> Run:
        """Call an op with copies of the tensors, which keep their strides and where they begin."""
        with self.on(device, order=order) as launches:
            given = tuple(_fenced(one) if isinstance(one, Tensor) else one for one in arguments)
            result = getattr(torch.ops.mlr1_emulated, name)(*given)
        return Run(result=result, arguments=given, launches=launches)


def _fenced(tensor: Tensor) -> Tensor:
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()
    return memory.view(tensor.dtype).as_strided(
        tensor.size(), tensor.stride(), tensor.storage_offset()
    )


def displaced(tensor: Tensor) -> Tensor:
    """Copy a tensor to a place one element behind where vectors may begin."""
    memory = tensor.new_zeros(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    """Copy a tensor to every second element of a larger one's last dimension."""
    memory = tensor.new_zeros(*tensor.shape[:-1], tensor.size(-1) * 2)
    return memory[..., ::2].copy_(tensor)
