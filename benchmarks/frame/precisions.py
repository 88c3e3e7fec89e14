"""The precisions that are compared, as the engine's flags over a recipe in bf16 or fp32."""

from collections.abc import Mapping
from typing import Final

from benchmarks.frame import machine

_HYBRID: Final = ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe")

PRECISIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "bf16": ("--bf16",),
    "fp8-tensorwise": (*_HYBRID, "tensorwise"),
    "fp8-delayed": (
        *(*_HYBRID, "delayed"),
        *("--fp8-amax-history-len", "1024", "--fp8-amax-compute-algo", "max"),
    ),
    "fp8-blockwise": (*_HYBRID, "blockwise"),
    "fp8-tensorwise-ends-bf16": (*_HYBRID, "tensorwise", "--first-last-layers-bf16"),
}
"""The last keeps the first and the last layer in bf16. The head is in bf16 in all of them."""


def missing(precision: str) -> str | None:
    """Say why a precision cannot be measured here, before a run finds out; None where it can."""
    if not precision.startswith("fp8"):
        return None
    return machine.missing("transformer_engine", "transformer-engine")
