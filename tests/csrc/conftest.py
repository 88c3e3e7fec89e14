"""Runs CUDA code on a CPU: kernels by themselves, and whole `csrc/*.cu` with their host code."""

import hashlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.csrc.devices import HostCode
from tests.csrc.kernels import Kernels

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CUDA_HOST = HERE / "cuda_host"
HOST_CODE = HERE / "host_code.cpp"
BUILT = HERE.parents[1] / "build" / "emulated"
TORCH = Path(torch.__file__).parent
FLAGS = shlex.split(
    "-std=c++20 -O1 -g1 -shared -fPIC -fvisibility=hidden -fno-gnu-unique "
    "-DMLR1_EMULATED -U_FORTIFY_SOURCE "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-attributes "
    "-fsanitize=alignment,shift,signed-integer-overflow,bounds,null "
    "-fsanitize-undefined-trap-on-error"
)
# Each access to memory becomes a call, which memory_accesses.h answers instead of GCC's library.
WATCHED = shlex.split("-fsanitize=thread --param=tsan-instrument-func-entry-exit=0")
LIBRARIES = shlex.split("-nodefaultlibs -lstdc++ -lm -lgcc_s -lgcc -lc")


@pytest.fixture(scope="session")
def library() -> Callable[[Path], Path]:
    """Build a `.cpp` or `.cu` for this machine's CPU, unless the same text was built before."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C++ compiler ({compiler[0]}) to run kernels on a CPU")
    return lambda source: _library(source, compiler)


@pytest.fixture(scope="session")
def emulated(library: Callable[[Path], Path]) -> Callable[[str], Kernels]:
    """Give the entry points of `tests/csrc/<stem>.cpp`."""
    built: dict[str, Kernels] = {}

    def kernels(stem: str) -> Kernels:
        if stem not in built:
            built[stem] = Kernels(library(HERE / f"{stem}.cpp"))
        return built[stem]

    return kernels


@pytest.fixture(scope="session")
def host_code(library: Callable[[Path], Path]) -> Callable[[str], HostCode]:
    """Give the ops of `csrc/<stem>.cu`."""
    built: dict[str, HostCode] = {}

    def host(stem: str) -> HostCode:
        if stem not in built:
            importlib.import_module(f"megatron_mlr1.ops.{stem}")
            source = CSRC / f"{stem}.cu"
            ops = re.findall(r'm\.impl\("(\w+)"', source.read_text())
            built[stem] = HostCode(library(source), ops)
        return built[stem]

    return host


def _library(source: Path, compiler: list[str]) -> Path:
    words = [*compiler, *FLAGS, *WATCHED]
    if source.suffix == ".cu":
        # Stand-ins for CUDA's headers come before those of torch that have their names.
        words += [f"-I{CUDA_HOST}", f'-DMLR1_SOURCE="{source.name}"']
    words += [f"-I{CSRC}", f"-I{HERE}", f"-isystem{TORCH / 'include'}"]
    if source.suffix == ".cu":
        words += [f"-isystem{TORCH / 'include/torch/csrc/api/include'}", str(HOST_CODE)]
        words += [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    else:
        words += [str(source)]
    words += LIBRARIES
    version = [torch.__version__, *words]
    digest = hashlib.sha256(b"\0".join([*_texts(source), *map(str.encode, version)])).hexdigest()
    library = BUILT / f"{source.stem}-{source.suffix[1:]}-{digest[:16]}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        beside = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*words, "-o", str(beside)], capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
        beside.replace(library)
    return library


def _texts(source: Path) -> list[bytes]:
    """Read a source and all that it includes of ours."""
    texts: dict[Path, bytes] = {}
    waiting = [source, HOST_CODE]
    while waiting:
        path = waiting.pop()
        if path not in texts:
            texts[path] = path.read_bytes()
            names = re.findall(r'^#include ["<](.+)[">]', texts[path].decode(), re.MULTILINE)
            places = [folder / name for name in names for folder in (CSRC, HERE, CUDA_HOST)]
            waiting += [place for place in places if place.is_file()]
    return [texts[path] for path in sorted(texts)]
