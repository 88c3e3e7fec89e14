"""Claim: distillation of two fused heads takes less memory than torch's, and no more time.

Value and both gradients of cross-entropy and forward KL in one, at the published widths of the
student and a teacher of width 4,096, over 128,256 ids. Every row runs in a process of its own:
microseconds a token of the clock and of all threads together, and the peak of memory above the
inputs (on a CPU resident memory, on a GPU what torch allocated). `--save` keeps the table in
benchmarks/results/.
"""

import argparse
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

RESULTS = Path(__file__).parent / "results" / "linear_kl.md"
VOCABULARY = 128_256
TEACHER_WIDTH = 4096
ALPHA = 0.5
WIDTHS = {"cpu": (576, 1536), "cuda": (576, 1024, 1536)}
TOKENS = {"cpu": (768,), "cuda": (4096, 16384, 32768)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
REPEATS = {"cpu": 1, "cuda": 20}
Step = Callable[["Inputs"], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What every implementation gets."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def first(self, tokens: int) -> "Inputs":
        """Give the first tokens alone."""
        return replace(
            self,
            hidden=self.hidden[:tokens].detach().requires_grad_(),
            teacher_hidden=self.teacher_hidden[:tokens],
            labels=self.labels[:tokens],
        )


def head(width: int, device: str, dtype: torch.dtype) -> Tensor:
    """Make random rows of a head whose logits spread by about 2."""
    weight = torch.empty(VOCABULARY, width, device=device, dtype=dtype)
    return weight.normal_(std=2 / width**0.5)


def main() -> None:
    """Measure on the GPU where there is one, else on the CPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULTS.name}")
    save = parser.parse_args().save
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = os.getloadavg()[0]
    lines = [
        "# Two linear heads, cross-entropy and forward KL",
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
    # Student: logits and two products of their gradient; teacher: logits.
    tera = 2 * (3 * width + TEACHER_WIDTH) * VOCABULARY * tokens / seconds / 1e12
    wall, cpu = (value / tokens * 1e6 for value in (seconds, cpu_seconds))
    return f"{start} {wall:,.1f} | {tera:.3g} | {cpu:,.1f} | {peak / 1e9:.2f} |"


def measure(device: str, width: int, tokens: int, name: str, send: object) -> None:
    """Run one implementation: seconds of a step, and bytes above the inputs."""
    torch.manual_seed(0)
    dtype = DTYPES[device]
    made = Inputs(
        hidden=torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True),
        weight=head(width, device, dtype).requires_grad_(),
        teacher_hidden=torch.randn(tokens, TEACHER_WIDTH, device=device, dtype=dtype),
        teacher_weight=head(TEACHER_WIDTH, device, dtype),
        labels=torch.randint(0, VOCABULARY, (tokens,), device=device),
    )
    step = STEPS[name]
    # The first tokens alone load what is loaded once.
    step(made.first(8))
    made.weight.grad = None
    before = memory(device, reset=True)
    times, cpu_begin = [], time.process_time()
    for _ in range(REPEATS[device]):
        made.hidden.grad = made.weight.grad = None
        begin = time.perf_counter()
        step(made)
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


def fused(made: Inputs) -> None:
    """Ours, as the loss head calls it."""
    from megatron_mlr1.losses.distillation import HiddenTargets, Lesson, distillation_loss
    from megatron_mlr1.losses.vocab_parallel import TensorParallel
    from megatron_mlr1.ops.linear_kl import Head

    distillation_loss(
        Head(hidden=made.hidden, weight=made.weight),
        Lesson(targets=HiddenTargets(hidden=made.teacher_hidden), alpha=ALPHA),
        made.labels,
        torch.ones_like(made.labels),
        teacher_weight=made.teacher_weight,
        parallel=TensorParallel(group=None, num_ids=VOCABULARY),
    ).total.backward()


def plain(made: Inputs) -> None:
    """torch's two products, two log-softmaxes and their divergence."""
    student = functional.linear(made.hidden, made.weight).float().log_softmax(1)
    teacher = functional.linear(made.teacher_hidden, made.teacher_weight).float().log_softmax(1)
    kd = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    ce = functional.nll_loss(student, made.labels, reduction="sum")
    (ALPHA * kd + (1 - ALPHA) * ce).backward()


def liger_jsd(made: Inputs) -> None:
    """Liger's chunked distillation loss, with beta 0: the forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=0.0, compiled=True
    )(made.hidden, made.weight, made.teacher_hidden, made.teacher_weight, made.labels).backward()


STEPS: dict[str, Step] = {
    "mlr1": fused,
    "torch: linear, log_softmax, kl_div": plain,
    "Liger: LigerFusedLinearJSDLoss": liger_jsd,
}
LIGER = {"Liger: LigerFusedLinearJSDLoss"}


def no_liger(device: str) -> str | None:
    """Say why Liger cannot run here."""
    if device != "cuda":
        return "left out: Triton needs a GPU"
    return None if find_spec("liger_kernel") else "left out: liger-kernel is not installed"


def notes(device: str) -> list[str]:
    """What a reader of the figures must know."""
    text = (
        "mlr1 includes the metrics of the log: entropy, agreement, head and tail of the divergence."
    )
    if device == "cpu":
        text += " torch keeps whole logits and their gradients; ours does not grow with the tokens."
    return [text, "", "Measured by `python benchmarks/bench_linear_kl.py --save`."]


def machine(device: str) -> str:
    """Name of what was measured."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
