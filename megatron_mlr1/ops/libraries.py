r"""Losses of a linear head from other people's libraries, to compare with and to choose.

    liger   LinkedIn's Liger-Kernel (arXiv:2410.10989): chunked head and cross-entropy, chunked head
            and generalised JSD, in Triton
    quack   quack-kernels of T. Dao's group: chunked head and cross-entropy for Hopper, in CuTe
    te      Transformer Engine: cross-entropy over a tensor of all logits, in Triton

A library is imported when it is called and never before, so that nobody needs one who did not
choose it; `require` says at the start of a run what is missing. Each sums over tokens, as our
losses do, and leaves a token out whose label is `LEFT_OUT`. The gradient of the head comes back in
the type of the head, by way of autograd.
"""

from collections.abc import Mapping
from importlib import import_module, metadata
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_mlr1 import cpu
from megatron_mlr1.errors import MachineError

LEFT_OUT = -100
"""Label of a token that does not count."""

EXTRAS: Mapping[str, str] = MappingProxyType({"liger": "liger", "quack": "quack", "te": "fp8"})
"""The extra of this package that brings each."""

PACKAGES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "liger": ("liger-kernel", "0.8.5"),
        "quack": ("quack-kernels", "0.6.5"),
        "te": ("transformer-engine", "2.18.0"),
    }
)
"""Name and least version of each package. Of the first two it is the version whose calls are made
here; Transformer Engine's cross-entropy gave wrong gradients before its 2.18 (its pull request
3193)."""


def require(library: str) -> None:
    """Refuse a machine on which a library cannot run.

    Raises:
        MachineError: its package is missing or too old, or there is no CUDA device.
    """
    package, least = PACKAGES[library]
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise MachineError(
            f"The kernels of {library} need the package {package}, which is not installed. Install "
            f"it (pip install 'megatron_mlr1[{EXTRAS[library]}]' '{package}>={least}'), or choose "
            "mlr1 or reference in --mlr1-kernels."
        ) from None
    if _numbers(found) < _numbers(least):
        raise MachineError(
            f"The kernels of {library} need {package} {least} or later; {found} is installed. "
            f"Install a later one (pip install '{package}>={least}'), or choose mlr1 or reference "
            "in --mlr1-kernels."
        )
    if cpu.is_active() or not torch.cuda.is_available():
        raise MachineError(
            f"The kernels of {library} run on an NVIDIA GPU, and torch finds no CUDA device here. "
            "Choose mlr1 or reference in --mlr1-kernels, which run on any."
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Read 2.18.0+abc as (2, 18, 0)."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdecimal())


def liger_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum the cross-entropy of the tokens that are not `LEFT_OUT`, by Liger.

    Args:
        hidden_ND: hidden states.
        weight_VD: the whole head, in their type.
        labels_N: int64.

    Returns:
        scalar, fp32; autograd gives both gradients.
    """
    function = import_module("liger_kernel.ops.fused_linear_cross_entropy")
    total: Tensor = function.LigerFusedLinearCrossEntropyFunction.apply(
        *liger_cross_entropy_words(hidden_ND, weight_VD, labels_N)
    )[0]
    return total


def liger_cross_entropy_words(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor
) -> tuple[Any, ...]:
    """Give the arguments of Liger's function in its order, which takes no keywords."""
    bias = class_weight = softcap = None
    z_loss, smoothing, return_z_loss = 0.0, 0.0, False
    # fp32: the head's gradient is a sum over many chunks.
    settings = (LEFT_OUT, z_loss, smoothing, "sum", softcap, return_z_loss, torch.float32)
    return (hidden_ND, weight_VD, labels_N, bias, class_weight, *settings)


def quack_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum the cross-entropy of the tokens that are not `LEFT_OUT`, by quack.

    Args:
        hidden_ND: hidden states.
        weight_VD: the whole head, in their type; V and D multiples of 8.
        labels_N: int64.

    Returns:
        scalar, fp32; autograd gives both gradients.
    """
    function = import_module("quack.linear_cross_entropy")
    # It takes tokens in eights.
    odd = -hidden_ND.size(0) % 8
    if odd:
        hidden_ND = functional.pad(hidden_ND, (0, 0, 0, odd))
        labels_N = functional.pad(labels_N, (0, odd), value=LEFT_OUT)
    total: Tensor = function.chunked_linear_cross_entropy(
        hidden_ND, weight_VD, labels_N, ignore_index=LEFT_OUT, reduction="sum"
    )
    return total


def liger_divergence(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    labels_N: Tensor,
    *,
    direction: str,
    temperature: float,
    beta: float,
) -> Tensor:
    """Sum the divergence from the teacher over the tokens that are not `LEFT_OUT`, by Liger.

    Args:
        student: hidden states [N, D] and the whole head [V, D].
        teacher: its own, over the same V ids.
        labels_N: int64; only whether a token is left out is read.
        direction: of `linear_kl.Objective`.
        temperature: T.
        beta: of `linear_kl.Objective`; for the JSD above 0 and below 1.

    Returns:
        scalar, fp32, without T^2; autograd gives the student's gradients.
    """
    function = import_module("liger_kernel.ops.fused_linear_jsd")
    # Its formula has the forward divergence at 0 and the reverse one at 1.
    share = {"forward": 0.0, "reverse": 1.0}.get(direction, beta)
    words = (*student, *teacher, labels_N, share, LEFT_OUT, temperature, torch.float32)
    mean: Tensor = function.LigerFusedLinearJSDFunction.apply(*words)
    return mean * (labels_N != LEFT_OUT).sum()
