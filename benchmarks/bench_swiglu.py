"""Claim: forward and backward of the compiled SwiGLU take less time than torch's three calls.

Prints a table per device: milliseconds and GB/s of useful traffic (forward reads 2F and writes F
numbers a row; forward and backward together read 5F and write 3F) for the op, torch, and on CUDA
the engine's fused function. `--save` keeps the table in benchmarks/results/.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from megatron_mlr1.ops.extension import EXTENSION
from megatron_mlr1.ops.swiglu import swiglu

RESULTS = Path(__file__).parent / "results" / "swiglu.md"
WIDTH = 6144
"""The 950M model's feed-forward width."""
ROWS = {"cpu": 1024, "cuda": 16384}
REPEATS = {"cpu": 20, "cuda": 100}


def main() -> None:
    """Measure on every device of this machine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULTS.name}")
    save = parser.parse_args().save
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    text = "\n".join(["# SwiGLU", "", *(line for device in devices for line in table(device))])
    print(text)
    if save:
        RESULTS.write_text(text + "\n")


def table(device: str) -> list[str]:
    """Rows of the table of one device, in Markdown."""
    rows = ROWS[device]
    lines = [
        f"{machine(device)}; torch {torch.__version__}; {rows} x 2 x {WIDTH}; "
        f"compiled ops: {'yes' if EXTENSION else 'no'}. Best of {REPEATS[device]}.",
        "",
        "| type | implementation | forward ms | GB/s | forward + backward ms | GB/s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, 2 * WIDTH, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn(rows, WIDTH, device=device, dtype=dtype)
        for name, function in implementations(device).items():
            forward = best_seconds(forward_of(function, x), device)
            both = best_seconds(both_of(function, x, grad), device)
            unit = grad.numel() * grad.element_size() / 1e9
            lines.append(
                f"| {str(dtype).removeprefix('torch.')} | {name} | {forward * 1e3:.3f} | "
                f"{3 * unit / forward:.0f} | {both * 1e3:.3f} | {8 * unit / both:.0f} |"
            )
    return [*lines, ""]


def implementations(device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compared, by name."""
    named: dict[str, Callable[[Tensor], Tensor]] = {
        "mlr1": lambda x: swiglu(x, kernel="mlr1"),
        "torch: chunk, silu, multiply": torch_swiglu,
    }
    if device == "cuda":
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

        named["Megatron-Core: bias_swiglu_impl"] = lambda x: bias_swiglu_impl(x, None)
    return named


def torch_swiglu(gate_up: Tensor) -> Tensor:
    """The peer: three calls of torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def forward_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """One forward without a graph."""

    def run() -> object:
        with torch.no_grad():
            return function(x)

    return run


def both_of(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], object]:
    """One forward and one backward."""
    return lambda: torch.autograd.grad(function(x), x, grad)


def best_seconds(run: Callable[[], object], device: str) -> float:
    """Shortest of several runs, after two that warm up."""
    times = []
    for repeat in range(REPEATS[device] + 2):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat >= 2:
            times.append(time.perf_counter() - start)
    return min(times)


def machine(device: str) -> str:
    """Name of what was measured."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
