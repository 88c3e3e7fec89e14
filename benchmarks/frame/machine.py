"""The machine that is measured: its device, its versions, and where its results lie."""

import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

import torch

from megatron_mlr1 import cpu

RESULTS: Final = Path(__file__).parents[1] / "results"
Device = Literal["cpu", "cuda"]
FOLDERS: Final = ("h200", "h100", "gh200", "h800", "a100", "b200", "l40s")
PACKAGES: Final = (
    "megatron-core",
    "transformer-engine",
    "liger-kernel",
    "quack-kernels",
    "triton",
)


def device() -> Device:
    """Name the device that is measured: the GPU where there is one."""
    # CPU mode answers for CUDA in a process that it is active in.
    return "cuda" if torch.cuda.is_available() and not cpu.is_active() else "cpu"


def device_name() -> str:
    """Name the device for a person."""
    if device() == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}"


def folder_of(name: str) -> str:
    """Give the folder of a GPU's results: `h200` of "NVIDIA H200"."""
    words = name.lower().replace("-", " ").split()
    known = [folder for folder in FOLDERS if folder in words]
    return known[0] if known else "_".join(word for word in words if word != "nvidia")


def results_file(stem: str, suffix: str = ".md") -> Path:
    """Say where a table is kept: `results/` of a CPU, `results/h200/` of a GPU."""
    folder = RESULTS / folder_of(device_name()) if device() == "cuda" else RESULTS
    return folder / f"{stem}{suffix}"


def described() -> str:
    """Say on what was measured, in one line: device, versions, load."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{device_name()}, {cores} cores, load before the start {os.getloadavg()[0]:.1f}"]
    if device() == "cuda":
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        parts.append(f"{gib:.0f} GiB of GPU memory, CUDA {torch.version.cuda}")
    else:
        parts.append(f"{torch.get_num_threads()} threads")
    versions = [f"{name} {found}" for name in PACKAGES if (found := version(name))]
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}", *versions]
    return "; ".join([*parts, ", ".join(versions)]) + "."


def version(distribution: str) -> str | None:
    """Give the version of an installed package, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def missing(module: str, distribution: str) -> str | None:
    """Say why a peer of a GPU cannot run here; None where it can.

    Args:
        module: what is imported.
        distribution: what is installed for it.
    """
    if device() == "cpu":
        return "left out: it needs a GPU"
    return None if find_spec(module) else f"left out: {distribution} is not installed"
