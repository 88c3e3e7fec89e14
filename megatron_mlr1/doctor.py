"""Says in one screen what this machine has, and what that means for training.

`inspect_machine` looks and never fails for what is missing; the rest turns the `Machine` that it
saw into words. Nothing is imported but torch, the ops and, where a GPU is, Transformer Engine: the
versions of other packages are read from their metadata.
"""

import argparse
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from megatron_mlr1.errors import MachineError

DALI_DISTRIBUTIONS: Final = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
SIZES: Final = ("140m", "360m", "950m")
BYTES_PER_PARAMETER: Final = 18
"""bf16 weights with fp32 gradients, master weights and two Adam moments, on one device: the table
in Megatron-LM's docs of the distributed optimizer. Activations come on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One CUDA device that torch can use."""

    name: str
    memory_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRows:
    """One op of `megatron_mlr1.ops` and the devices that have a compiled row for it."""

    name: str
    devices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What was found; None stands for what is not there."""

    python: str
    system: str
    num_cores: int
    memory_gib: float | None
    torch: str | None = None
    torch_cuda: str | None = None
    """The CUDA version that torch was built with."""
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    fault: str | None = None
    """Why training cannot start before somebody mends the machine."""
    nccl: str | None = None
    nvcc: str | None = None
    megatron_core: str | None = None
    has_dataset_helpers: bool = False
    """Whether Megatron-Core's index builders are compiled for this Python."""
    transformer_engine: str | None = None
    apex: str | None = None
    has_nvidia_apex: bool = False
    """False also for the package of the same name on the public registry, which is another one."""
    dali: str | None = None
    extension: str | None = None
    ops: tuple[OpRows, ...] = ()


def inspect_machine() -> Machine:
    """Look at this machine."""
    machine = Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        num_cores=_num_cores(),
        memory_gib=_memory_gib(),
        driver=_driver(Path("/proc/driver/nvidia/version")),
        nvcc=_nvcc(),
        megatron_core=_version("megatron-core"),
        has_dataset_helpers=_has_dataset_helpers(),
        transformer_engine=_version("transformer-engine"),
        apex=_version("apex"),
        has_nvidia_apex=_has_module("apex", "optimizers/fused_adam.py"),
        dali=next(filter(None, map(_version, DALI_DISTRIBUTIONS)), None),
    )
    try:
        import torch
    except (ImportError, OSError) as error:
        return replace(machine, fault=f"torch cannot be imported ({error}); install it.")
    from megatron_mlr1.cpu import device_fault

    gpus = _gpus()
    machine = replace(
        machine,
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        gpus=gpus,
        nccl=_nccl(),
        fault=_transformer_engine_fault() if gpus else device_fault(),
    )
    return _with_ops(machine)


def report(machine: Machine) -> str:
    """The one screen: facts, then what they mean."""
    table = facts(machine)
    width = max(len(name) for name, _ in table)
    lines = [f"{name:<{width}}  {value}" for name, value in table]
    heading = "What that means for training here"
    return "\n".join([*lines, "", heading, *(f"  {line}" for line in meaning(machine))])


def facts(machine: Machine) -> list[tuple[str, str]]:
    """Name and value of everything that was looked for."""
    memory = "unknown memory" if machine.memory_gib is None else f"{machine.memory_gib:.0f} GiB"
    built_for = f"CUDA {machine.torch_cuda}" if machine.torch_cuda else "no CUDA"
    return [
        ("Machine", f"{machine.system}, {machine.num_cores} cores, {memory}"),
        ("Python", machine.python),
        ("torch", f"{machine.torch}, built for {built_for}" if machine.torch else "not installed"),
        ("NVIDIA driver", machine.driver or "none"),
        *_gpu_facts(machine.gpus),
        ("NCCL", machine.nccl or "none"),
        ("nvcc", machine.nvcc or "none"),
        ("Megatron-Core", _megatron_fact(machine)),
        ("Transformer Engine", machine.transformer_engine or "none"),
        ("Apex", _apex_fact(machine)),
        ("DALI", machine.dali or "none"),
        ("Compiled ops", machine.extension or "not built; every op runs by its Python definition"),
        *((f"  {op.name}", " ".join(op.devices) or "Python definition") for op in machine.ops),
    ]


def meaning(machine: Machine) -> list[str]:
    """What the facts mean for training, in a few lines."""
    if shortcoming(machine, need_gpu=False):
        return ["Nothing trains here before the error below is mended."]
    if not machine.gpus:
        return [
            "CPU mode: the engine runs on gloo, for learning, tests and small runs.",
            "Sizes: tiny (`make demo`); the real sizes want a GPU.",
            "Attention: torch's. Optimizer: torch's Adam. FP8: no.",
        ]
    return [
        f"GPU: NCCL, {len(machine.gpus)} process(es) on this machine.",
        f"Sizes: {_sizes(machine.gpus)}.",
        f"Attention: {'Transformer Engine' if machine.transformer_engine else 'torch'}'s. "
        f"Optimizer: {_optimizer(machine)}'s Adam.",
        f"FP8: {_fp8(machine)}.",
    ]


def _gpu_facts(gpus: Sequence[Gpu]) -> list[tuple[str, str]]:
    if not gpus:
        return [("GPUs", "none that torch can use")]
    return [
        (
            f"GPU {index}",
            f"{gpu.name}, {gpu.memory_gib:.0f} GiB, "
            f"compute capability {gpu.capability[0]}.{gpu.capability[1]}",
        )
        for index, gpu in enumerate(gpus)
    ]


def _megatron_fact(machine: Machine) -> str:
    if machine.megatron_core is None:
        return "not installed"
    compiled = "compiled" if machine.has_dataset_helpers else "NOT compiled for this Python"
    return f"{machine.megatron_core}, dataset helpers {compiled}"


def _apex_fact(machine: Machine) -> str:
    if machine.has_nvidia_apex:
        return f"{machine.apex or 'unknown version'} (NVIDIA's)"
    if machine.apex:
        return f"{machine.apex} is another package of that name, not NVIDIA's; it is not used"
    return "none"


def _sizes(gpus: Sequence[Gpu]) -> str:
    # Half of the smallest memory is left for activations and logits.
    room = min(gpu.memory_gib for gpu in gpus) * 2**30 / 2
    from megatron_mlr1.model.shape import named_shape

    needed = {size: named_shape(size).num_parameters() * BYTES_PER_PARAMETER for size in SIZES}
    fit = [size for size in SIZES if needed[size] <= room]
    return f"tiny, {', '.join(fit)} fit a GPU whole" if fit else "tiny; the others need sharding"


def _optimizer(machine: Machine) -> str:
    if machine.transformer_engine:
        return "Transformer Engine"
    return "Apex" if machine.has_nvidia_apex else "torch"


def _fp8(machine: Machine) -> str:
    lowest = min(gpu.capability for gpu in machine.gpus)
    if lowest < (8, 9):
        return "no, the GPU must have compute capability 8.9 or more"
    if machine.transformer_engine is None:
        return (
            "not yet, Transformer Engine is missing: "
            "pip install --no-build-isolation 'megatron_mlr1[fp8]'"
        )
    recipes = ["tensorwise", "delayed"]
    cuda = tuple(map(int, (machine.torch_cuda or "0.0").split(".")))
    recipes += ["blockwise"] if lowest[0] == 9 and cuda >= (12, 9) else []
    recipes += ["mxfp8"] if lowest[0] >= 10 else []
    return f"yes, --fp8-format hybrid --fp8-recipe {' | '.join(recipes)}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_module(package: str, path: str) -> bool:
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return any((Path(place) / path).exists() for place in places or ())


def _has_dataset_helpers() -> bool:
    stem = "core/datasets/helpers_cpp"
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    return any(_has_module("megatron", stem + suffix) for suffix in suffixes)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return None


def _driver(version_file: Path) -> str | None:
    try:
        found = re.search(r"\s(\d+\.\d+[\d.]*)\s", version_file.read_text())
    except OSError:
        return None
    return found[1] if found else "unknown version"


def _nvcc() -> str | None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\S+),", answer)
    return f"{found[1] if found else 'unknown version'} ({nvcc})"


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    seen = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(
        Gpu(
            name=device.name,
            memory_gib=device.total_memory / 2**30,
            capability=(device.major, device.minor),
        )
        for device in seen
    )


def _transformer_engine_fault() -> str | None:
    from megatron_mlr1.model.precision import transformer_engine_version

    try:
        transformer_engine_version()
    except MachineError as error:
        return str(error)
    return None


def _nccl() -> str | None:
    import torch
    from torch import distributed

    if torch.version.cuda is None or not distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _with_ops(machine: Machine) -> Machine:
    try:
        from megatron_mlr1 import ops
        from megatron_mlr1.ops.extension import EXTENSION, has_row
    except MachineError as error:
        return replace(machine, fault=machine.fault or str(error))
    import torch

    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{module.name}")
    names = sorted(
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mlr1::")
    )
    rows = tuple(
        OpRows(name=name, devices=tuple(d for d in ("CPU", "CUDA") if has_row(name, d)))
        for name in names
    )
    return replace(machine, extension=EXTENSION.name if EXTENSION else None, ops=rows)


def shortcoming(machine: Machine, *, need_gpu: bool) -> str | None:
    """Why the doctor ends with an error; None where this machine can do what it must."""
    if machine.fault:
        return machine.fault
    if machine.megatron_core is None:
        return "Megatron-Core, the engine, is not installed; `make setup` installs it."
    if need_gpu and not machine.gpus:
        return (
            "this needs an NVIDIA GPU that torch can use, and there is none; "
            "run it on a machine that has one (`make test` is for this one)."
        )
    return None


def main(words: Sequence[str] | None = None) -> int:
    """Print the screen; 2 where training, or what was asked for, cannot start on this machine."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mlr1.doctor",
        description="What this machine has, and what that means for training here.",
    )
    parser.add_argument(
        "--need-gpu", action="store_true", help="end with exit code 2 where torch can use no GPU"
    )
    options = parser.parse_args(words)
    machine = inspect_machine()
    print(report(machine))
    problem = shortcoming(machine, need_gpu=options.need_gpu)
    if problem is None:
        return 0
    sys.stdout.flush()
    print(f"\nERROR: {problem}", file=sys.stderr)
    return MachineError.exit_code


if __name__ == "__main__":
    sys.exit(main())
