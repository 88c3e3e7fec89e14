"""Several implementations of one op over the same inputs, each in a process of its own."""

import gc
import multiprocessing
import re
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, Literal, Self

import torch

from benchmarks.frame import machine, roofline
from benchmarks.frame.roofline import Work
from benchmarks.frame.table import Table, kept_in, measured_by

Step = Callable[[], object]
SEED = 0
SPEED = ("implementation", ">ms", ">us/token", ">rate", ">of roofline", ">peak GB", ">CPU ms")
SECONDS = 1.0
"""How long one implementation is repeated, if it is at least `LEAST` and at most `MOST` times."""
LEAST = {"cpu": 1, "cuda": 5}
MOST = 200
WARM_UP = 3
"""Runs on a GPU that are not counted: kernels are compiled and tuned, workspaces allocated."""
LIMIT_S: Final = 240.0
"""Seconds that a process may take to start and to measure one case, with all that it compiles."""
HOPELESS: Final = ("failed: ImportError", "failed: ModuleNotFoundError")
"""How a failure begins that comes back with every other case."""
OURS = "mlr1"
"""What the names of our own implementations begin with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One size of the problem."""

    cells: tuple[str, ...]
    """What stands in the first columns of its rows."""
    tokens: int
    width: int
    """Of the hidden states, or of the feed-forward layer."""
    work: Work
    """What any implementation must do."""
    part: str = ""
    """What of the op is run, where there is a choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrant:
    """One implementation."""

    name: str
    prepare: Callable[[Case], Step]
    """Makes the inputs of a case on the device and gives what is timed; a function of a module."""
    needs: tuple[str, str] | None = None
    """Module and distribution of a peer that runs on a GPU alone; None runs anywhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one implementation took for one step."""

    seconds: float
    """Median."""
    cpu_seconds: float
    """Of all threads together, on average."""
    peak_bytes: int
    """Above the inputs: on a GPU what torch allocated, on a CPU resident memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """All of a table."""

    stem: str
    title: str
    about: str
    columns: tuple[str, ...]
    """Names of `Case.cells`."""
    rate: Literal["TFLOP/s", "GB/s"]
    entrants: Sequence[Entrant]
    notes: tuple[str, ...] = ()


def hold(contest: Contest, cases: Sequence[Case], *, save: bool) -> None:
    """Measure every case with every entrant; print and keep each row at once.

    Raises:
        SystemExit: one of ours failed; a peer that fails is a row with its reason.
    """
    roof = roofline.roof_here()
    columns = [f">{contest.rate}" if name == ">rate" else name for name in SPEED]
    here = f"{machine.described()} {contest.about} {_method()}"
    table = Table(
        contest.title,
        (*contest.columns, *columns),
        about=(here, roofline.described(roof)),
        notes=(*contest.notes, measured_by(contest.stem)),
        file=kept_in(save, contest.stem),
    )
    reasons = {entrant.name: _reason(entrant) for entrant in contest.entrants}
    for name, reason in reasons.items():
        if reason is not None:
            table.add(*("all" for _ in contest.columns), f"{name}: {reason}")
    broken: list[str] = []
    with ExitStack() as stack:
        present = [entrant for entrant in contest.entrants if reasons[entrant.name] is None]
        lasts = machine.device() == "cuda"
        booths = {entrant: stack.enter_context(Booth(lasts=lasts)) for entrant in present}
        for case in cases:
            for entrant, booth in list(booths.items()):
                found = booth.measured(entrant, case)
                if isinstance(found, str):
                    table.add(*case.cells, f"{entrant.name}: {found}")
                    broken += [found] if entrant.name.startswith(OURS) else []
                    if found.startswith(HOPELESS):
                        del booths[entrant]
                else:
                    table.add(*case.cells, entrant.name, *_cells(contest, case, found, roof))
    table.close()
    if broken:
        raise SystemExit(f"{contest.stem}: {broken[0]}")


def _reason(entrant: Entrant) -> str | None:
    return None if entrant.needs is None else machine.missing(*entrant.needs)


def _method() -> str:
    if machine.device() == "cuda":
        return (
            f"Median of CUDA events around each of at least {LEAST['cuda']} runs after {WARM_UP} "
            "that do not count, the L2 cache overwritten before each; peak memory above the inputs "
            "is torch's."
        )
    return (
        "Median of the runs of one second, of one run where that takes longer, after a small "
        "warm-up; peak resident memory above the inputs."
    )


def _cells(
    contest: Contest, case: Case, found: Measured, roof: roofline.Roof | None
) -> tuple[str, ...]:
    amount = case.work.flops / 1e12 if contest.rate == "TFLOP/s" else case.work.bytes / 1e9
    return (
        f"{found.seconds * 1e3:,.3f}",
        f"{found.seconds / case.tokens * 1e6:,.3g}",
        f"{amount / found.seconds:,.3g}",
        roofline.share(case.work, found.seconds, roof),
        f"{found.peak_bytes / 1e9:.2f}",
        f"{found.cpu_seconds * 1e3:,.1f}",
    )


class Booth:
    """Where one implementation is measured, apart from the others.

    A process that lasts loads libraries, and makes a context on a GPU, once for all cases. It ends
    with its first failure: what is broken in a process, a CUDA context above all, is broken for all
    that comes later.
    """

    def __init__(self, *, lasts: bool) -> None:
        """Start a process where it is to last: all booths of a table start at once.

        Args:
            lasts: from case to case; on a CPU it must not, since memory that was used once stays
                with a process.
        """
        self._line: Connection | None = None
        self._process: BaseProcess | None = None
        self._lasts = lasts
        if self._lasts:
            self._start()

    def measured(self, entrant: Entrant, case: Case) -> Measured | str:
        """Measure one case; where that fails, say why in its words."""
        if self._line is None:
            self._start()
        assert self._line is not None, "it was just started"
        assert self._process is not None, "it was just started"
        try:
            self._line.send((entrant.prepare, case))
            if self._line.poll(LIMIT_S):
                answer: Measured | str = self._line.recv()
            else:
                answer = f"stopped after {LIMIT_S:.0f} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            answer = f"ended with code {self._process.exitcode}"
        if isinstance(answer, str) or not self._lasts:
            self._end()
        return answer

    def __enter__(self) -> Self:
        """Give the booth itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End the process."""
        self._end()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def _end(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._line = self._process = None


def _serve(line: Connection) -> None:
    """Measure what comes over the line, until it is closed."""
    # The engine warns of each accelerator that is absent, in every process.
    warnings.filterwarnings("ignore", module="megatron")
    while True:
        try:
            prepare, case = line.recv()
        except EOFError:
            return
        try:
            found = measure_here(prepare, case)
            _forget()
            line.send(found)
        except Exception as error:
            # Whatever a peer raises is its row; the table must go on.
            traceback.print_exc()
            words = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
            line.send(f"failed: {words.replace('|', '/')[:160]}")
            return


def measure_here(prepare: Callable[[Case], Step], case: Case) -> Measured:
    """Measure one implementation in this process."""
    cuda = machine.device() == "cuda"
    if cuda:
        # cuBLAS takes its workspace from torch's memory: it is no implementation's own.
        one = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
        torch.mm(one, one)
    else:
        # A few tokens load what is loaded once.
        prepare(_small(case))()
    flush = torch.empty(_cache_bytes() if cuda else 0, dtype=torch.int8, device=machine.device())
    torch.manual_seed(SEED)
    step = prepare(case)
    gc.collect()
    before = memory(reset=True)
    if cuda:
        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    cpu_begin = time.process_time()
    times = repeated(partial(_gpu_seconds if cuda else _cpu_seconds, step, flush))
    return Measured(
        seconds=statistics.median(times),
        cpu_seconds=(time.process_time() - cpu_begin) / len(times),
        peak_bytes=memory() - before,
    )


def _forget() -> None:
    """Give memory back, which others want, and let torch compile for the next sizes alone."""
    gc.collect()
    if machine.device() == "cuda":
        torch.cuda.empty_cache()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def repeated(clock: Callable[[], float]) -> list[float]:
    """Take a time again and again: for `SECONDS` on the whole, `LEAST` to `MOST` times."""
    times: list[float] = []
    least = LEAST[machine.device()]
    while len(times) < least or (sum(times) < SECONDS and len(times) < MOST):
        times.append(clock())
    return times


def _small(case: Case) -> Case:
    return Case(cells=case.cells, tokens=16, width=case.width, work=case.work, part=case.part)


def _cache_bytes() -> int:
    # Twice the cache: nothing of the last run is left in it.
    return 2 * int(torch.cuda.get_device_properties(0).L2_cache_size)


def _gpu_seconds(step: Step, flush: torch.Tensor) -> float:
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _cpu_seconds(step: Step, flush: torch.Tensor) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def memory(*, reset: bool = False) -> int:
    """Give the highest memory since the last reset, in bytes; a reset gives what is in use."""
    if machine.device() == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        # Linux: the peak of resident memory becomes what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak, "this kernel does not count the peak of resident memory"
    return int(peak[1]) * 1024


def dtype_here() -> torch.dtype:
    """Give the type of the measurements: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if machine.device() == "cuda" else torch.float32


def random(*shape: int, std: float = 1.0, grad: bool = False, dtype: Any = None) -> torch.Tensor:
    """Make normal numbers on the device, in the type of the measurements if no other is named."""
    made = torch.empty(shape, device=machine.device(), dtype=dtype or dtype_here())
    return made.normal_(std=std).requires_grad_(grad)
