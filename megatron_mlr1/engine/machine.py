"""The engine's words that depend on the machine, and the peak of its device."""

import importlib.util
import os
import socket
from collections.abc import Sequence

import torch

from megatron_mlr1 import cpu
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.model.precision import transformer_engine_version

ALWAYS = ("--no-create-attention-mask-in-dataloader",)
"""Attention is causal, so no mask tensor of seq-length^2 is ever made."""

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


def words(user: Sequence[str]) -> tuple[str, ...]:
    """Give the flags that this machine calls for; the user's own, which follow, win.

    Raises:
        ConfigError: FP8 is asked for where Transformer Engine or a device for it is missing.
    """
    chosen = list(ALWAYS)
    if cpu.is_active():
        chosen += cpu.FLAGS
    elif transformer_engine_version() is None:
        chosen += WITHOUT_TRANSFORMER_ENGINE
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        # The engine's own linear layers take this from NVIDIA Apex; Transformer Engine's do not.
        chosen.append("--no-gradient-accumulation-fusion")
    _refuse_fp8(user)
    return tuple(dict.fromkeys(chosen))


def _refuse_fp8(user: Sequence[str]) -> None:
    asked = [word for word in user if word.startswith("--fp8-format")]
    if not asked:
        return
    if cpu.is_active():
        raise ConfigError(
            f"{asked[0]} needs an NVIDIA GPU of compute capability 8.9 or higher, and this run is "
            "in CPU mode. Leave the FP8 flags out here."
        )
    if transformer_engine_version() is None:
        raise ConfigError(
            f"{asked[0]} needs Transformer Engine, which does not import here. Install it "
            "(pip install --no-build-isolation 'megatron_mlr1[fp8]'), see `python -m "
            "megatron_mlr1.doctor`, or leave the FP8 flags out."
        )


def environment() -> None:
    """Set what the engine demands of the environment, where nobody else has."""
    # Tensor and context parallelism order their kernels by it on devices before Blackwell.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
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
