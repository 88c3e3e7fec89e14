"""What a device can do at the most, with the source of each figure, and how near a time comes."""

from dataclasses import dataclass
from typing import Final

from benchmarks.frame import machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Roof:
    """The two limits of one device."""

    flops: float
    """Dense bf16 FLOP/s of matrix products."""
    bytes_per_second: float
    """Of its memory."""
    source: str
    """Of both figures."""


ROOFS: Final = {
    "h200": Roof(
        flops=790e12,
        bytes_per_second=4.3e12,
        source="measured on one H200: 790 TFLOP/s of cuBLAS in bf16, 4.3 TB/s of copies; "
        "the data sheet says 989 and 4.8",
    ),
    "h100": Roof(
        flops=989e12,
        bytes_per_second=3.35e12,
        source="NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s dense bf16, 3.35 TB/s",
    ),
    "a100": Roof(
        flops=312e12,
        bytes_per_second=2.039e12,
        source="NVIDIA's data sheet of the A100 80 GB SXM: 312 TFLOP/s dense bf16, 2.039 TB/s",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a step must do whoever does it: no recomputation, every number moved once."""

    flops: float = 0.0
    bytes: float = 0.0

    def seconds(self, roof: Roof) -> float:
        """Give the shortest time: arithmetic and traffic side by side, the longer one counts."""
        return max(self.flops / roof.flops, self.bytes / roof.bytes_per_second)


def roof_here() -> Roof | None:
    """Give the limits of this machine's GPU; None where it is not in the table."""
    if machine.device() == "cpu":
        return None
    return ROOFS.get(machine.folder_of(machine.device_name()))


def described(roof: Roof | None) -> str:
    """Say what the roofline's share is a share of."""
    if roof is None:
        return "No roofline: the limits of this device are not in the benchmarks' table."
    return (
        f"Roofline: the longer of FLOPs / {roof.flops / 1e12:.0f} TFLOP/s and bytes / "
        f"{roof.bytes_per_second / 1e12:.2f} TB/s ({roof.source}), every number moved once."
    )


def share(work: Work, seconds: float, roof: Roof | None) -> str:
    """Write how much of the roofline a time reaches, for a cell."""
    return "" if roof is None else f"{work.seconds(roof) / seconds:.0%}"
