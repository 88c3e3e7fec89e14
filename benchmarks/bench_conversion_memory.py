"""Measure the peak memory of both weight conversions for the 950M: at most 2.5x its fp32 weights.

Every row runs in a process of its own, whose peak is what the kernel counted for it (ru_maxrss:
mapped files and the interpreter with its libraries included). The peer is transformers itself,
loading and saving the same folder.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import psutil

from megatron_mlr1 import cpu
from megatron_mlr1.ending import clean_exit
from megatron_mlr1.model.shape import named_shape

LIMIT: Final = 2.5
"""Peak memory as a multiple of the fp32 weights."""
RESULT: Final = Path(__file__).parent / "results" / "conversion_memory.md"
PACKAGES: Final = ("torch", "megatron-core", "transformers", "safetensors")

MODEL_950M: Final = named_shape("950m")


@dataclass(frozen=True, slots=True)
class Row:
    """What one process took."""

    what: str
    peak_bytes: int
    seconds: float


def make_checkpoint(folder: Path) -> None:
    """Write random weights as a Megatron checkpoint."""
    cpu.activate()
    import torch

    from megatron_mlr1.checkpoint.architecture import Architecture
    from megatron_mlr1.checkpoint.megatron import write_release
    from megatron_mlr1.checkpoint.names import Place
    from megatron_mlr1.checkpoint.tensors import megatron_shape

    def random(place: Place) -> torch.Tensor:
        return torch.randn(megatron_shape(place.row, MODEL_950M)) * 0.02

    architecture = Architecture(
        shape=MODEL_950M, rotary_base=8e6, max_positions=32768, norm_epsilon=1e-5
    )
    (folder / "megatron").mkdir()
    write_release(folder / "megatron", architecture, random, dtype=torch.float32, tokenizer=None)


def megatron_to_hf(folder: Path) -> None:
    """Convert in one direction."""
    cpu.activate()
    from megatron_mlr1.checkpoint.convert import megatron_to_hf

    megatron_to_hf(folder / "megatron", folder / "hf")


def hf_to_megatron(folder: Path) -> None:
    """Convert in the other direction."""
    cpu.activate()
    from megatron_mlr1.checkpoint.convert import hf_to_megatron

    hf_to_megatron(folder / "hf", folder / "back")


def transformers_alone(folder: Path) -> None:
    """Load the same folder with transformers and save it again."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "hf").save_pretrained(folder / "peer")


def measure(what: str, body: Callable[[Path], None], folder: Path) -> Row:
    """Run a body in a fresh process, and give its time and peak memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(body, folder, sender))
    child.start()
    sender.close()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{what} ended with status {child.exitcode}")
    peak_bytes, seconds = receiver.recv()
    return Row(what, peak_bytes, seconds)


def _report(
    body: Callable[[Path], None],
    folder: Path,
    sender: "multiprocessing.connection.Connection[tuple[int, float], None]",
) -> None:
    start = time.perf_counter()
    body(folder)
    seconds = time.perf_counter() - start
    # In KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, seconds))


def table(rows: list[Row]) -> str:
    """Give the measurements as Markdown, with the machine and the versions."""
    weights = MODEL_950M.num_parameters() * 4
    lines = [
        "# Peak memory of weight conversion, 950M",
        "",
        f"Weights in fp32: {weights / 1e9:.2f} GB ({MODEL_950M.num_parameters():,} parameters). "
        f"Limit: {LIMIT}x = {LIMIT * weights / 1e9:.2f} GB.",
        "",
        "| process | peak GB | peak / weights | seconds |",
        "|---|---|---|---|",
        *(
            f"| {row.what} | {row.peak_bytes / 1e9:.2f} | {row.peak_bytes / weights:.2f}x "
            f"| {row.seconds:.0f} |"
            for row in rows
        ),
        "",
        f"{_processor()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB "
        f"RAM; Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        + ".",
        "Peaks count the interpreter, its libraries and mapped files; seconds count imports.",
        "",
        "Measured by `python -m benchmarks.bench_conversion_memory --save`.",
    ]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    """Measure, print, and fail where a conversion takes more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULT.name}")
    parser.add_argument("--folder", type=Path, help="where 16 GB of weights may lie for a while")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        measure("make", make_checkpoint, folder)
        ours = [
            measure("megatron-to-hf", megatron_to_hf, folder),
            measure("hf-to-megatron", hf_to_megatron, folder),
        ]
        peer = measure("transformers: from_pretrained, save_pretrained", transformers_alone, folder)
    text = table([*ours, peer])
    print(text)
    if options.save:
        RESULT.write_text(text, "utf-8")
    limit = LIMIT * MODEL_950M.num_parameters() * 4
    return int(any(row.peak_bytes > limit for row in ours))


if __name__ == "__main__":
    with clean_exit():
        sys.exit(main())
