"""Loads the compiled rows of the ops, where `setup.py` built them.

An op is whole without them: the library only replaces rows of ops that are defined in Python, so
nothing asks whether it is there but the doctor and the tests.
"""

from pathlib import Path

import torch

from megatron_mlr1.errors import MachineError


def find_extension(package: Path) -> Path | None:
    """Path of the compiled library in the folder of this package; None where none was built."""
    return next(iter(sorted(package.glob("_C*.so"))), None)


def load_extension(library: Path) -> None:
    """Register the library's rows with torch.

    Raises:
        MachineError: the library does not load, most often because torch changed since its build.
    """
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise MachineError(
            f"{library} does not load into torch {torch.__version__} ({error}); "
            "it must be built with the torch that loads it. "
            "Build it anew with `make extension`, or delete it: every op works without."
        ) from error


def has_row(op: str, device: str) -> bool:
    """Whether the op has a compiled row for the device.

    Args:
        op: name of an op that is defined by now, such as "mlr1::swiglu".
        device: torch's dispatch key, "CPU" or "CUDA".
    """
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op, device))


EXTENSION = find_extension(Path(__file__).parents[1])
"""The library that is loaded in this process, or None."""

if EXTENSION is not None:
    load_extension(EXTENSION)
