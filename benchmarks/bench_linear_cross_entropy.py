"""Claim: the fused head and cross-entropy take less memory than torch's, and no more time.

Value and both gradients of one loss at the published widths over 128,256 ids. Every row runs in a
process of its own: microseconds a token of the clock and of all threads together, and the peak of
memory above the inputs (on a CPU resident memory, on a GPU what torch allocated). `--save` keeps
the table in benchmarks/results/.
"""

import argparse
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

RESULTS = Path(__file__).parent / "results" / "linear_cross_entropy.md"
VOCABULARY = 128_256
WIDTHS = {"cpu": (576, 1536), "cuda": (576, 1024, 1536)}
TOKENS = {"cpu": (1024,), "cuda": (4096, 16384, 32768)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
REPEATS = {"cpu": 1, "cuda": 20}
Step = Callable[[Tensor, Tensor, Tensor], object]


def main() -> None:
    """Measure on the GPU where there is one, else on the CPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULTS.name}")
    save = parser.parse_args().save
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = os.getloadavg()[0]
    lines = [
        "# Linear head and cross-entropy",
        "",
        f"{machine(device)}, load before the start {load:.1f}; torch {torch.__version__}; "
        f"{VOCABULARY:,} ids, {str(DTYPES[device]).removeprefix('torch.')}; forward and backward; "
        f"median of {REPEATS[device]} after a warm-up.",
        "",
        "| width | tokens | implementation | us/token | TFLOP/s | CPU us/token | peak GB |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for width in WIDTHS[device]:
        for tokens in TOKENS[device]:
            for name in STEPS:
                lines.append(row(device, width, tokens, name))
                print(lines[-1], flush=True)
    lines += ["", *notes(device)]
    print("\n".join(lines))
    if save:
        RESULTS.write_text("\n".join(lines) + "\n")


def row(device: str, width: int, tokens: int, name: str) -> str:
    """Measure one implementation in a fresh process."""
    start = f"| {width} | {tokens} | {name} |"
    if name in LIGER and (reason := no_liger(device)):
        return f"{start} {reason} | | | |"
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(device, width, tokens, name, send))
    process.start()
    send.close()
    try:
        seconds, cpu_seconds, peak = receive.recv()
    except EOFError:
        process.join()
        return f"{start} ended with code {process.exitcode} | | | |"
    process.join()
    tera = 6 * width * VOCABULARY * tokens / seconds / 1e12
    wall, cpu = (value / tokens * 1e6 for value in (seconds, cpu_seconds))
    return f"{start} {wall:,.1f} | {tera:.3g} | {cpu:,.1f} | {peak / 1e9:.2f} |"


def measure(device: str, width: int, tokens: int, name: str, send: object) -> None:
    """Run one implementation: seconds of a step, and bytes above the inputs."""
    torch.manual_seed(0)
    dtype = DTYPES[device]
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.empty(VOCABULARY, width, device=device, dtype=dtype)
    weight.normal_(std=0.02).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,), device=device)
    step = STEPS[name]
    # The first tokens alone load what is loaded once.
    step(hidden[:8].detach().requires_grad_(), weight, labels[:8])
    weight.grad = None
    before = memory(device, reset=True)
    times, cpu_begin = [], time.process_time()
    for _ in range(REPEATS[device]):
        hidden.grad = weight.grad = None
        begin = time.perf_counter()
        step(hidden, weight, labels)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    cpu_seconds = (time.process_time() - cpu_begin) / REPEATS[device]
    answer = statistics.median(times), cpu_seconds, memory(device) - before
    send.send(answer)  # type: ignore[attr-defined]


def memory(device: str, *, reset: bool = False) -> int:
    """Give the highest memory since the last reset, in bytes."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak, "this kernel does not count the peak of resident memory"
    return int(peak[1]) * 1024


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Ours, as the loss head calls it."""
    from megatron_mlr1.losses.language_model import linear_language_model_loss
    from megatron_mlr1.losses.vocab_parallel import TensorParallel

    parallel = TensorParallel(group=None, num_ids=VOCABULARY)
    mask = torch.ones_like(labels)
    linear_language_model_loss(hidden, weight, labels, mask, parallel=parallel).total.backward()


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """torch's product and cross-entropy, in fp32 behind the product as the engine has it."""
    logits = functional.linear(hidden, weight)
    functional.cross_entropy(logits.float(), labels, reduction="sum").backward()


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels).backward()


STEPS: dict[str, Step] = {
    "mlr1": fused,
    "torch: linear, cross_entropy": plain,
    "Liger: fused linear cross-entropy": liger,
}
LIGER = {"Liger: fused linear cross-entropy"}


def no_liger(device: str) -> str | None:
    """Say why Liger cannot run here."""
    if device != "cuda":
        return "left out: Triton needs a GPU"
    return None if find_spec("liger_kernel") else "left out: liger-kernel is not installed"


def notes(device: str) -> list[str]:
    """What a reader of the figures must know."""
    text = "mlr1 includes the tokens' compaction and gradients of hidden states and head in fp32."
    if device == "cpu":
        text += " torch keeps whole logits and their gradients; ours does not grow with the tokens."
    return [text, "", "Measured by `python benchmarks/bench_linear_cross_entropy.py --save`."]


def machine(device: str) -> str:
    """Name of what was measured."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
