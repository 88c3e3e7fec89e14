"""What a run says of itself: throughput from an exact FLOP count, and a record of every step.

The engine's log is not a witness: the second line of any process averages two steps. The record
holds the exact figures of each step instead.
"""

import inspect
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import megatron.training.training
import torch
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.training import get_tensorboard_writer, get_timers, global_vars

from megatron_mlr1 import cpu
from megatron_mlr1.checkpoint.folder import replace_text
from megatron_mlr1.model.shape import ModelShape

RECORD = "metrics.jsonl"
"""The record's name in the folder of the checkpoints: a line of JSON for each step."""


class Count(Protocol):
    """Knows which corpora samples came from."""

    def samples(self, consumed: int) -> dict[str, int]:
        """Count the first `consumed` samples by corpus."""


class Counted(Protocol):
    """Data that may know it, on the process that reports."""

    @property
    def count(self) -> Count | None:
        """None where nothing is known."""


class Figures(Protocol):
    """Has something to say of the last step."""

    @property
    def figures(self) -> Mapping[str, object]:
        """By name; numbers are drawn in TensorBoard too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """The speed of the whole run over one log interval."""

    tokens_per_second: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    """10^12 FLOP/s of each device: forward and backward, without recompute."""
    mfu: float | None
    """Share of the device's dense bf16 peak, 0 to 1; None where the peak is not known."""


def throughput(
    *,
    shape: ModelShape,
    tokens: float,
    sum_squared_lengths: float,
    seconds: float,
    devices: int,
    peak_tflops: float | None,
) -> Throughput:
    """Work out the speed of a run.

    Args:
        shape: the model.
        tokens: tokens trained on in the interval.
        sum_squared_lengths: sum of length^2 over the sequences, or documents where masked.
        seconds: wall-clock time of the interval.
        devices: processes of the run.
        peak_tflops: dense peak of one device.
    """
    tflops = shape.training_flops(tokens, sum_squared_lengths) / seconds / devices / 1e12
    return Throughput(
        tokens_per_second=tokens / seconds,
        tokens_per_second_per_gpu=tokens / seconds / devices,
        tflops_per_gpu=tflops,
        mfu=None if peak_tflops is None else tflops / peak_tflops,
    )


class Record:
    """A file with one line of JSON for each step, cut back to where a run resumes."""

    def __init__(self, path: Path, *, last_iteration: int) -> None:
        """Open the record and drop what came after `last_iteration`: it will be done again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [
            line for line in _whole_lines(path) if json.loads(line)["iteration"] <= last_iteration
        ]
        replace_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._is_late = False

    def add(self, row: Mapping[str, object]) -> None:
        """Append one step. Floats keep all their digits.

        What a full disk does not take waits for the next step, to the byte: the checkpoint that
        does not fit ends a run, not its record.
        """
        self._waiting += (json.dumps(row) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._is_late = False
        except OSError as error:
            if not self._is_late:
                _warn(f"{self._file.name} cannot be written ({error.strerror}); its lines wait")
            self._is_late = True


def _whole_lines(path: Path) -> list[str]:
    """Read the lines that were written to their end; a killed process may leave half a line."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [line for line in lines[:-1] if line]


def _warn(what: str) -> None:
    with suppress(OSError):  # the log may lie on the same disk
        print(f"warning: {what}.", file=sys.stderr, flush=True)


class Curves:
    """TensorBoard's writer, which ends where its file cannot be written; the run goes on."""

    def __init__(self, writer: Any) -> None:
        """Take the engine's."""
        self._writer = writer
        self._has_ended = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Give one of its functions."""
        return partial(self._call, getattr(self._writer, name))

    def _call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        if self._has_ended:
            return None
        try:
            return function(*arguments, **keywords)
        except OSError as error:
            self._has_ended = True
            _warn(f"TensorBoard's file cannot be written ({error.strerror}); its curves end here")


class Writer(Protocol):
    """What we use of a TensorBoard writer."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write one point of a curve."""


class Metrics:
    """Stands around the engine's `training_log`, which every process calls after each step."""

    def __init__(
        self,
        args: Namespace,
        shape: ModelShape,
        datasets: Counted,
        peak_tflops: float | None,
        lessons: Figures | None = None,
    ) -> None:
        """Take the engine's validated arguments, the model, its data and the device's peak.

        Args:
            args: the engine's, validated.
            shape: the model.
            datasets: they may know which corpora samples came from.
            peak_tflops: of one device.
            lessons: what a teacher's part in the run adds to the record of each step.
        """
        self._lessons = lessons
        self._waits_ms: list[float] = []
        self._args = args
        self._shape = shape
        self._datasets = datasets
        self._peak_tflops = peak_tflops
        self._record: Record | None = None
        self._tokens = 0.0
        self._squares = 0.0

    def install(self) -> None:
        """Take the place of the engine's `training_log`, and call it in the middle."""
        if get_tensorboard_writer() is not None:
            global_vars._GLOBAL_TENSORBOARD_WRITER = Curves(get_tensorboard_writer())
        engine_log = megatron.training.training.training_log
        signature = inspect.signature(engine_log)

        def log(*arguments: Any, **keywords: Any) -> Any:
            step = signature.bind(*arguments, **keywords).arguments
            seconds = self._count(step)
            answer = engine_log(*arguments, **keywords)
            if self._args.rank == self._args.world_size - 1:
                speed = None if seconds is None else self._speed(seconds)
                self._write(step, speed)
            if seconds is not None:
                self._tokens, self._squares = 0.0, 0.0
            return answer

        megatron.training.training.training_log = log

    def _count(self, step: Mapping[str, Any]) -> float | None:
        """Count one step; where a log interval ends, give the seconds since the last one did."""
        length = self._args.seq_length
        batch = get_current_running_global_batch_size()
        squares = step.get("seqlen_squared_sum_in_batch")
        self._tokens += batch * length
        self._squares += batch * length**2 if squares is None else squares
        # In a process's first step the engine logs, but lets its timer run on; so do we.
        if step["iteration"] % self._args.log_interval != 0 or step.get("is_first_iteration"):
            return None
        # The engine stops this timer for evaluation and saving.
        return float(get_timers()("interval-time").elapsed(reset=False))

    def _speed(self, seconds: float) -> Throughput:
        return throughput(
            shape=self._shape,
            tokens=self._tokens,
            sum_squared_lengths=self._squares,
            seconds=seconds,
            devices=self._args.world_size,
            peak_tflops=self._peak_tflops,
        )

    def _write(self, step: Mapping[str, Any], speed: Throughput | None) -> None:
        """Write one step to the record, and the end of an interval to log and TensorBoard."""
        iteration, samples = step["iteration"], self._args.consumed_train_samples
        tokens = samples * self._args.seq_length
        row: dict[str, object] = {
            "iteration": iteration,
            "consumed_samples": samples,
            "tokens": tokens,
            **{name: value.item() for name, value in step["loss_dict"].items()},
            "learning_rate": step["learning_rate"],
            "grad_norm": None if step["grad_norm"] is None else float(step["grad_norm"]),
            "skipped": bool(step["skipped_iter"]),
        }
        lessons = {} if self._lessons is None else dict(self._lessons.figures)
        row |= lessons
        if "kd wait ms" in lessons:
            self._waits_ms.append(float(str(lessons["kd wait ms"])))
        if speed is not None:
            corpora = self._corpus_tokens()
            peak = peak_memory()
            print(line(iteration, tokens, speed, corpora, peak) + self._waited(), flush=True)
            plot(get_tensorboard_writer(), iteration, tokens, speed, corpora, peak)
            plot_lessons(get_tensorboard_writer(), iteration, lessons)
            row |= {
                "tokens_per_second": speed.tokens_per_second,
                "tflops_per_gpu": speed.tflops_per_gpu,
                "mfu": speed.mfu,
                "peak_memory_bytes": peak,
                "corpus_tokens": corpora,
            }
        if self._args.save is not None:
            if self._record is None:
                self._record = Record(Path(self._args.save) / RECORD, last_iteration=iteration - 1)
            self._record.add(row)

    def _waited(self) -> str:
        """Say how long the steps of an interval waited for their targets, on average."""
        waits, self._waits_ms = self._waits_ms, []
        return f" | kd_wait_ms: {sum(waits) / len(waits):.1f}" if waits else ""

    def _corpus_tokens(self) -> dict[str, int]:
        count = self._datasets.count
        if count is None:
            return {}
        samples = count.samples(self._args.consumed_train_samples)
        return {name: number * self._args.seq_length for name, number in samples.items()}


def peak_memory() -> int | None:
    """Give the most bytes that torch held on this process's GPU since its start; None on a CPU."""
    return None if cpu.is_active() else torch.cuda.max_memory_allocated()


def line(
    iteration: int,
    tokens: int,
    speed: Throughput,
    corpora: Mapping[str, int],
    peak_bytes: int | None,
) -> str:
    """Write the line that follows the engine's own in the log."""
    parts = [
        f" iteration {iteration:8d}",
        f"tokens seen: {_short(tokens)}",
        f"tokens/s: {_short(speed.tokens_per_second)}",
        f"tokens/s/GPU: {_short(speed.tokens_per_second_per_gpu)}",
        f"TFLOP/s/GPU: {speed.tflops_per_gpu:.4g}",
        "MFU: peak unknown" if speed.mfu is None else f"MFU: {100 * speed.mfu:.1f} %",
    ]
    if peak_bytes is not None:
        parts.append(f"peak memory: {peak_bytes / 1e9:.1f} GB")
    if corpora:
        parts.append(
            "tokens by corpus: " + ", ".join(f"{k} {_short(v)}" for k, v in corpora.items())
        )
    return " | ".join(parts)


def plot(
    writer: Writer | None,
    iteration: int,
    tokens: int,
    speed: Throughput,
    corpora: Mapping[str, int],
    peak_bytes: int | None,
) -> None:
    """Draw the same in TensorBoard, where the engine opened it."""
    if writer is None:
        return
    writer.add_scalar("throughput/tokens-per-second", speed.tokens_per_second, iteration)
    writer.add_scalar(
        "throughput/tokens-per-second-per-gpu", speed.tokens_per_second_per_gpu, iteration
    )
    writer.add_scalar("throughput/tflops-per-gpu", speed.tflops_per_gpu, iteration)
    if speed.mfu is not None:
        writer.add_scalar("throughput/mfu", speed.mfu, iteration)
    if peak_bytes is not None:
        writer.add_scalar("memory/peak-gb", peak_bytes / 1e9, iteration)
    writer.add_scalar("tokens/seen", tokens, iteration)
    for name, count in corpora.items():
        writer.add_scalar(f"tokens/{name}", count, iteration)


def plot_lessons(writer: Writer | None, iteration: int, lessons: Mapping[str, object]) -> None:
    """Draw the numbers of a teacher's part in TensorBoard."""
    for name, value in lessons.items():
        if writer is not None and isinstance(value, int | float):
            writer.add_scalar(f"distillation/{name.replace(' ', '-')}", value, iteration)


def _short(number: float) -> str:
    """Write a count with three digits and a unit: 1.53M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
