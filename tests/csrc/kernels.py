"""Kernels by themselves, run on a CPU through the entry points of `tests/csrc/<stem>.cpp`."""

import ctypes
import weakref
from pathlib import Path

import torch
from torch import Tensor

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""Numbers that `with_type` in cuda_on_cpu.h knows."""


class KernelError(Exception):
    """What the emulator found wrong."""


class Kernels:
    """The functions of one library, each of which runs a kernel."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.mlr1_allocate.restype = ctypes.c_void_p

    def place(self, tensor: Tensor, *, alignment: int | None = None) -> Tensor:
        """Copy a tensor to memory of its own, whose end lies at a page that nobody may touch.

        Args:
            tensor: any; the copy is contiguous.
            alignment: of the copy, bytes. None is the element's size, so that no byte lies between
                the last element and the page; kernels that move vectors want 16.
        """
        size = tensor.numel() * tensor.element_size()
        alignment = alignment or tensor.element_size()
        address = self._library.mlr1_allocate(ctypes.c_int64(size), ctypes.c_int64(alignment))
        memory = (ctypes.c_ubyte * max(size, 1)).from_address(address)
        weakref.finalize(memory, self._library.mlr1_free, ctypes.c_void_p(address))
        placed = (
            torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel())
            if size
            else (torch.empty(0, dtype=tensor.dtype))
        )
        return placed.view(tensor.shape).copy_(tensor)

    def run(self, entry: str, *arguments: Tensor | float | torch.dtype, order: int = 0) -> None:
        """Run a kernel.

        Args:
            entry: name of the function.
            arguments: of the function: a pointer for a tensor, int64 for a whole number and for a
                dtype, double for a float; the order comes last.
            order: in which threads run: 0 first things first, 1 last things first, else the seed
                of a random order.

        Raises:
            KernelError: a barrier that not all threads reach, an access outside of memory, ...
        """
        function = self._library[entry]
        function.restype = ctypes.c_char_p
        message = function(*map(_argument, arguments), ctypes.c_int64(order))
        if message is not None:
            raise KernelError(message.decode())


def _argument(value: Tensor | float | torch.dtype) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous(), "kernels take contiguous memory"
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, torch.dtype):
        return ctypes.c_int64(TYPES[value])
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)
