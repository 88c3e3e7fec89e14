"""Builds csrc/ into one library, megatron_mlr1/_C, that replaces rows of ops defined in Python.

Whether there is a GPU plays no part. With nvcc and a CUDA build of torch the library has the CPU
and the CUDA rows; with a C++ compiler alone the CPU rows; without one, or where torch cannot be
imported (pip's isolated builds), the package is pure Python and whole.

MLR1_EXTENSION says what is wanted: `auto` (the default: what this machine can build; a compiler
that fails is reported and the installation goes on), `require` (stop where nothing can be built, or
a compiler fails) or `skip`. TORCH_CUDA_ARCH_LIST has torch's meaning.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.errors import BaseError

CSRC = Path("csrc")
# sm_90a for H100 and H200; the PTX of compute_80 serves every other device from Ampere on.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"
WITHOUT = "The ops use their Python definitions."


class NotBuiltError(Exception):
    """Why there is no library, or not all of it; for a person."""


def cuda_toolkit(torch_cuda: str | None) -> Path:
    """Root of the toolkit that fits torch's CUDA version."""
    if torch_cuda is None:
        raise NotBuiltError("this torch is a build without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        raise NotBuiltError("there is no nvcc")
    # nvcc may be a script or a link outside its toolkit: it alone knows where that is.
    words = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    dry_run = subprocess.run(words, capture_output=True, text=True, check=False).stderr
    root = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.", version.stdout)
    if root is None or release is None:
        raise NotBuiltError(f"{nvcc} does not answer as nvcc does")
    if release[1] != torch_cuda.split(".")[0]:
        raise NotBuiltError(f"nvcc is of CUDA {release[1]} and torch of CUDA {torch_cuda}")
    return Path(root[1]).resolve()


def cuda_extension(toolkit: Path, compile_flags: dict[str, list[str]], **options: Any) -> Any:
    """Both rows of every op."""
    os.environ["CUDA_HOME"] = str(toolkit)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    from torch.utils import cpp_extension

    # A toolkit may lack the headers of CUDA's libraries, which torch's own wheels bring along.
    brought = [
        flag
        for entry in map(Path, sys.path)
        for include in sorted(entry.glob("nvidia/*/include"))
        for flag in ("-isystem", str(include))
    ]
    compile_flags["nvcc"] = ["-O3", "-Xptxas=-v", "--threads=2", *brought]
    compile_flags["cxx"] += brought
    sources = sorted(map(str, [*CSRC.glob("cpu/*.cpp"), *CSRC.glob("*.cu")]))
    return cpp_extension.CUDAExtension(sources=sources, extra_compile_args=compile_flags, **options)


def extension_arguments(wanted: str) -> dict[str, Any]:
    """Arguments of `setup` for the library.

    Raises:
        NotBuiltError: this machine cannot build any of it.
    """
    if wanted == "skip":
        raise NotBuiltError("MLR1_EXTENSION is skip")
    try:
        import torch
    except ImportError:
        raise NotBuiltError(
            "torch cannot be imported in this build (see --no-build-isolation)"
        ) from None
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise NotBuiltError(f"there is no C++ compiler ({compiler})")
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    # The two -fno flags let GCC turn comparisons and roundings into vector code; they give up the
    # reports of floating-point exceptions that nobody reads, and change no result. No products that
    # are joined with sums: GCC would join them here and not there, and one formula would round in
    # two ways, by the loop it stands in and by the processor.
    flags = ("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
    compile_flags = {"cxx": ["-O3", *flags, *openmp]}
    options = {
        "name": "megatron_mlr1._C",
        "include_dirs": [str(CSRC.resolve())],
        "depends": sorted(map(str, [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])),
        "extra_link_args": openmp,
        "py_limited_api": True,  # it does not speak to Python at all
    }
    try:
        extension = cuda_extension(cuda_toolkit(torch.version.cuda), compile_flags, **options)
    except NotBuiltError as reason:
        say(f"the compiled ops get their CPU rows alone: {reason}.")
        from torch.utils import cpp_extension

        sources = sorted(map(str, CSRC.glob("cpu/*.cpp")))
        extension = cpp_extension.CppExtension(
            sources=sources, extra_compile_args=compile_flags, **options
        )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_command(wanted)}}


def build_command(wanted: str) -> Any:
    """torch's build, which goes on without the library where it is not required."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except (BaseError, RuntimeError, OSError, subprocess.SubprocessError) as error:
                if wanted == "require":
                    raise
                self.extensions = []
                say(f"no extension was built, the compiler failed: {error}. {WITHOUT}")

    return Build


def say(line: str) -> None:
    """One line for whoever installs."""
    print(f"megatron_mlr1: {line}", file=sys.stderr)


def main() -> None:
    """Run setuptools with whatever can be built here."""
    wanted = os.environ.get("MLR1_EXTENSION", "auto")
    if wanted not in ("auto", "require", "skip"):
        sys.exit(f"MLR1_EXTENSION is {wanted!r}; it must be auto, require or skip.")
    try:
        arguments = extension_arguments(wanted)
    except NotBuiltError as reason:
        if wanted == "require":
            sys.exit(f"megatron_mlr1: no extension can be built: {reason}.")
        say(f"no extension is built: {reason}. {WITHOUT}")
        arguments = {}
    setup(**arguments)


main()
