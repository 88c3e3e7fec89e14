"""Runs the bodies of CUDA kernels on a CPU: builds `tests/csrc/<stem>.cpp`, calls its functions."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILT = HERE.parents[1] / "build" / "emulated"
TORCH = Path(torch.__file__).parent / "include"
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""Numbers that `with_type` in cuda_on_cpu.h knows."""
FLAGS = shlex.split(
    "-std=c++20 -O1 -g0 -shared -fPIC -fvisibility=hidden -fno-gnu-unique -DMLR1_EMULATED "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-attributes "
    "-fsanitize=alignment,shift,signed-integer-overflow,bounds,null "
    "-fsanitize-undefined-trap-on-error"
)


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


@pytest.fixture(scope="session")
def emulated() -> Callable[[str], Kernels]:
    """Give the kernels of a stem, built unless the same text was built before."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C++ compiler ({compiler[0]}) to run kernels on a CPU")
    headers = sorted(path for folder in (CSRC, HERE) for path in folder.rglob("*.*h"))
    built: dict[str, Kernels] = {}

    def kernels(stem: str) -> Kernels:
        if stem not in built:
            built[stem] = Kernels(_library(stem, compiler, headers))
        return built[stem]

    return kernels


def _library(stem: str, compiler: list[str], headers: list[Path]) -> Path:
    source = HERE / f"{stem}.cpp"
    folders = [f"-I{CSRC}", f"-I{HERE}", f"-isystem{TORCH}"]
    words = [*compiler, *FLAGS, *folders, str(source)]
    texts = [path.read_bytes() for path in (source, *headers)]
    version = [torch.__version__, *words]
    digest = hashlib.sha256(b"\0".join([*texts, *map(str.encode, version)])).hexdigest()
    library = BUILT / f"{stem}-{digest[:16]}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        beside = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*words, "-o", str(beside)], capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
        beside.replace(library)
    return library
