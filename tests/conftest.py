"""Turns a marker into a skip that says what was needed and what was found."""

import importlib.util
import os
import signal

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.ops.extension import EXTENSION

NUM_GPUS = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Count the GPUs before any test turns CPU mode on; hide them from all but the GPU suite.

    CPU mode is what most tests are about, on a machine with a GPU too.
    """
    # A shell starts what runs in its background deaf to SIGINT, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A folder's own conftest may have turned CPU mode on already, as it does where no GPU is.
    has_gpu = torch.cuda.is_available() and not cpu.is_active()
    config.stash[NUM_GPUS] = torch.cuda.device_count() if has_gpu else 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let random numbers of a test depend neither on the tests before it nor on their order."""
    torch.manual_seed(0)


def _gpu(marker: pytest.Mark, found: int) -> str | None:
    needed = marker.kwargs.get("count", 1)
    if found >= needed:
        return None
    return f"needs {needed} NVIDIA GPU(s) that torch can use, found {found} (make gpu-check)"


def _te(marker: pytest.Mark, found: int) -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return "needs Transformer Engine, found none (pip install --no-build-isolation '.[fp8]')"
    return None


def _ext(marker: pytest.Mark, found: int) -> str | None:
    return None if EXTENSION else "needs the compiled ops, found none (make extension)"


_REASON_TO_SKIP = {"gpu": _gpu, "te": _te, "ext": _ext}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wants_slow = "slow" in config.option.markexpr
    for item in items:
        for name, reason_of in _REASON_TO_SKIP.items():
            marker = item.get_closest_marker(name)
            reason = reason_of(marker, config.stash[NUM_GPUS]) if marker else None
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("slow") and not wants_slow:
            item.add_marker(pytest.mark.skip(reason="takes long; make test-slow runs it"))
