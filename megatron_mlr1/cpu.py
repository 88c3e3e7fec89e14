"""CPU mode: lets the engine, which assumes CUDA, run where no CUDA device is.

Megatron-Core names `device="cuda"` and asks `torch.cuda` in a few hundred places. `activate()`
redirects both to the CPU for the rest of the process. With a CUDA device it does nothing; on a
machine that has an NVIDIA device whose driver fails it stops, because training there on the CPU
would hide the fault. CPU mode is for learning, tests and small runs.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Self

import torch
from torch.overrides import TorchFunctionMode

from megatron_mlr1.errors import MachineError

NVIDIA_DEVICE_FILES: Final = (Path("/dev/nvidia0"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Where a Linux kernel (the last: WSL) shows an NVIDIA device, whether or not its driver works."""

FLAGS: Final = (
    "--distributed-backend=gloo",
    "--transformer-impl=local",
    "--use-cpu-initialization",
    "--num-workers=0",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
)
"""The engine's flags without which it would reach for CUDA all the same."""


def is_active() -> bool:
    """Tell whether this process was redirected."""
    return isinstance(torch.cuda.current_device, _Answer)


def activate(*, device_files: tuple[Path, ...] = NVIDIA_DEVICE_FILES) -> bool:
    """Redirect CUDA to the CPU where there is no CUDA device; tell whether it did.

    Raises:
        MachineError: a device file says that an NVIDIA device is there, yet torch finds none.
    """
    if is_active():
        return True
    if torch.cuda.is_available():
        return False
    fault = device_fault(device_files)
    if fault is not None:
        raise MachineError(fault)
    # Inductor asks for the device too; read when torch._dynamo is first imported.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # The engine imports it wherever it is installed, and without a driver that import fails.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    _redirect_torch_cuda()
    _CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            "CPU mode: no CUDA device here, so the engine runs on the CPU over gloo. "
            "This is for learning, tests and small runs.",
            file=sys.stderr,
            flush=True,
        )
    return True


def device_fault(device_files: tuple[Path, ...] = NVIDIA_DEVICE_FILES) -> str | None:
    """Say why torch finds no GPU although there is one; None where there is none, or it is hidden.

    Args:
        device_files: what the kernel shows where it has an NVIDIA device.
    """
    present = [path for path in device_files if path.exists()]
    if not present or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    reason = "no device is visible"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    return (
        f"This machine has an NVIDIA device ({present[0]}) that torch {torch.__version__} cannot "
        f"use ({reason}). Training needs a working driver and a CUDA build of torch: mend the "
        "driver (nvidia-smi must list the device), or set CUDA_VISIBLE_DEVICES= (empty) to train "
        "on the CPU on purpose."
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Reads every request for a CUDA device as one for the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RETURNS_ITSELF:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer and the gradient clipping compare this very string.
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if func in _TAKES_DEVICE_BY_PLACE:
            args = tuple(_to_cpu(value) for value in args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _to_cpu(kwargs["device"])}
        if "pin_memory" in kwargs:
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


_RETURNS_ITSELF: Final = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory})
_TAKES_DEVICE_BY_PLACE: Final = frozenset({torch.Tensor.to, torch.Tensor.type})


def _to_cpu(value: Any) -> Any:
    """Give the CPU for whatever names a CUDA device, and anything else back as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "cpu"
    if isinstance(value, str):
        if value.startswith("torch.cuda."):
            return value.replace("torch.cuda.", "torch.", 1)
        return "cpu" if value.split(":")[0] == "cuda" else value
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class _Answer:
    """Answers any call to a function of `torch.cuda` with one value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


class _Stream:
    """A stream on which everything is done as soon as it is asked for."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def synchronize(self) -> None:
        """Return: nothing is ever outstanding."""

    def wait_stream(self, stream: object) -> None:
        """Return: nothing is ever outstanding."""

    def wait_event(self, event: object) -> None:
        """Return: nothing is ever outstanding."""

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        """Give an event of this moment."""
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        """Say that all work is done."""
        return True


class _Event:
    """An event that remembers the wall clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter()

    def record(self, stream: object = None) -> None:
        """Take the time."""
        self.seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Return: nothing is ever outstanding."""

    def synchronize(self) -> None:
        """Return: nothing is ever outstanding."""

    def query(self) -> bool:
        """Say that the event has happened."""
        return True

    def elapsed_time(self, end: "_Event") -> float:
        """Give the milliseconds from this event to another."""
        return (end.seconds - self.seconds) * 1e3


class _Generators:
    """Gives the CPU's generator for any device."""

    def __getitem__(self, device: object) -> torch.Generator:
        return torch.default_generator


@contextlib.contextmanager
def _on_stream(stream: object) -> Iterator[None]:
    yield


def _memory_in_use(*args: Any, **kwargs: Any) -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


class _MemoryStatistics(dict[str, int]):
    """Memory statistics in which whatever was not counted is zero."""

    def __missing__(self, key: str) -> int:
        return 0


def _memory_statistics(*args: Any, **kwargs: Any) -> _MemoryStatistics:
    in_use = _memory_in_use()
    names = (
        "allocated_bytes.all.current",
        "allocated_bytes.all.peak",
        "reserved_bytes.all.current",
    )
    return _MemoryStatistics(dict.fromkeys(names, in_use))


def _properties() -> SimpleNamespace:
    import psutil

    return SimpleNamespace(
        name="CPU",
        major=0,
        minor=0,
        total_memory=int(psutil.virtual_memory().total),
        multi_processor_count=os.cpu_count() or 1,
    )


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state.cpu())


def _redirect_torch_cuda() -> None:
    """Replace what the engine asks of `torch.cuda` by what is true of the CPU."""
    stream = _Stream()
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    answers: dict[str, Any] = {
        "is_available": _Answer(True),
        "is_initialized": _Answer(True),
        # One "device" for each process of this machine: the engine checks its ranks against it.
        "device_count": _Answer(ranks_here),
        # A number, since the engine also writes it into names of devices.
        "current_device": _Answer(0),
        "get_device_name": _Answer("CPU"),
        "get_device_capability": _Answer((0, 0)),
        "get_device_properties": _Answer(_properties()),
        "is_current_stream_capturing": _Answer(False),
        "current_stream": _Answer(stream),
        "default_stream": _Answer(stream),
        "stream": _on_stream,
        "device": _on_stream,
        "Stream": _Stream,
        "Event": _Event,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "memory_stats": _memory_statistics,
        "FloatTensor": torch.FloatTensor,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        # torch seeds the CPU's generator by itself whenever it seeds; this is for direct calls.
        "manual_seed": torch.default_generator.manual_seed,
        "default_generators": _Generators(),
    }
    answers |= {name: functools.partial(_memory_in_use) for name in _MEMORY}
    # One object for each name: dynamo refuses two names for one object.
    answers |= {name: _Answer(None) for name in _DONE_AT_ONCE}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    setattr(torch.cuda.random, "get_rng_state", _get_rng_state)  # noqa: B010
    setattr(torch.cuda.random, "set_rng_state", _set_rng_state)  # noqa: B010
    # Raises in the CUDA build of torch where there is no driver.
    setattr(torch.accelerator, "current_device_index", _Answer(0))  # noqa: B010
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _Answer(None))


_MEMORY: Final = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
)
_DONE_AT_ONCE: Final = (
    "set_device",
    "set_stream",
    "synchronize",
    "empty_cache",
    "reset_peak_memory_stats",
    "init",
    "manual_seed_all",
)
