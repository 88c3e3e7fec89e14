"""The engine's words that depend on the machine, and the peak of its device."""

import importlib.util
import os
import socket
from collections.abc import Sequence

import torch

from megatron_mlr1 import cpu
from megatron_mlr1.engine import fp8
from megatron_mlr1.model.precision import transformer_engine_version

ALWAYS = ("--no-create-attention-mask-in-dataloader", "--no-one-logger")
"""Attention is causal, so no mask tensor of seq-length^2 is ever made; and nobody outside NVIDIA
has its logger, whose absence the engine warns of."""

WITHOUT_TRANSFORMER_ENGINE = (
    "--transformer-impl=local",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
)

PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
)
"""Dense bf16 TFLOP/s of one device by a part of its name, from NVIDIA's data sheets.

FP8 runs are held against the same figure, so that their MFU can be compared with bf16's.
"""


FSDP = "--use-megatron-fsdp"
"""The flag with which the engine wants more than one connection."""


def words(user: Sequence[str]) -> tuple[str, ...]:
    """Give the flags that this machine calls for; the user's own, which follow, win.

    Raises:
        ConfigError: FP8 is asked for that cannot run here, see `engine/fp8.py`.
    """
    chosen = list(ALWAYS)
    if cpu.is_active():
        chosen += cpu.FLAGS
    elif transformer_engine_version() is None:
        chosen += WITHOUT_TRANSFORMER_ENGINE
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        # The engine's own linear layers take this from NVIDIA Apex; Transformer Engine's do not.
        chosen.append("--no-gradient-accumulation-fusion")
    if fp8.is_asked_for(user):
        fp8.refuse_impossible(
            user, device=_device(), transformer_engine=transformer_engine_version()
        )
    return tuple(dict.fromkeys(chosen))


def _device() -> fp8.Device | None:
    """Look at the device that FP8 would run on; None in CPU mode, where nothing is asked."""
    if cpu.is_active():
        return None
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return fp8.Device(
        name=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        cuda=(int(major), int(minor)),
    )


def environment(user: Sequence[str]) -> None:
    """Set what the engine demands of the environment, where nobody else has.

    Args:
        user: the words of the run, recipe included.
    """
    if FSDP not in user:
        # Tensor and context parallelism order their kernels by it on devices before Blackwell.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Else Transformer Engine 2.18 refuses the scales of a checkpoint in FP8 with delayed scaling,
    # as they are a pickle. So is the list of contents of every checkpoint, which the engine reads.
    os.environ.setdefault("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    if "RANK" not in os.environ:
        # Started without torchrun: one process, which meets nobody.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def peak_tflops(given: float | None) -> float | None:
    """Give the peak of one device for MFU: what the user says, else the data sheet's, else None."""
    if given is not None or cpu.is_active():
        return given
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS if part in name), None)
