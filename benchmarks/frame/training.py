"""Runs of the product's own command, and what their record says."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
RECORD = "metrics.jsonl"
REFUSAL = re.compile(r"^(?:\[rank \d+\] )?error: (.*)", re.MULTILINE)
"""The product's own sentence where it cannot do what was asked."""
FAILURE = re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b: .*)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a run."""

    rows: tuple[Mapping[str, Any], ...]
    """The record, a mapping for each step."""
    log: str
    why: str | None
    """Why the run did not come to its last step; None: it did."""
    is_refused: bool = False
    """Whether the product said that it cannot do this here; else, with `why`, it failed."""

    def tokens_per_second(self, first: int) -> float | None:
        """Give the median over the log intervals that begin at step `first` or later."""
        speeds = self._of_intervals("tokens_per_second", first)
        return statistics.median(speeds) if speeds else None

    def mfu(self, first: int) -> float | None:
        """Give the median share of the device's peak, 0 to 1; None where the peak is unknown."""
        shares = [share for share in self._of_intervals("mfu", first) if share is not None]
        return statistics.median(shares) if shares else None

    def _of_intervals(self, name: str, first: int) -> list[Any]:
        ends = [row for row in self.rows if "tokens_per_second" in row]
        interval = ends[0]["iteration"] if ends else 0
        return [row[name] for row in ends if row["iteration"] - interval >= first]

    def peak_bytes(self) -> int | None:
        """Give the most memory that torch held on the GPU; None on a CPU."""
        peaks = [row["peak_memory_bytes"] for row in self.rows if row.get("peak_memory_bytes")]
        return max(peaks, default=None)


def train(words: Sequence[str], save: Path, *, steps: int, timeout_s: float) -> Outcome:
    """Train on one device until a step is in the record, and stop there without saving.

    Args:
        words: of the product's command line, without --save, --train-iters and their like.
        save: an empty folder for the record.
        steps: the last step that is wanted.
        timeout_s: longer than this no run may take.
    """
    save.mkdir(parents=True)
    # One step more than is wanted: the run is ended before it would save.
    command = [sys.executable, "-m", "megatron_mlr1.train", *words, "--save", str(save)]
    command += ["--train-iters", str(steps + 1), "--save-interval", str(steps + 1)]
    command += ["--eval-iters", "0"]
    log = save / "log.txt"
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONWARNINGS": "ignore",
        # Nothing is downloaded; a machine without a network would be asked, and waited for.
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=save, env=environment
        )
        try:
            late = _wait(process, save, steps, timeout_s)
        finally:
            _end(process)
    rows, text = tuple(read_record(save))[:steps], log.read_text(errors="replace")
    why = None if rows and rows[-1]["iteration"] >= steps else (late or reason(text))
    refused = why is not None and REFUSAL.search(text) is not None
    return Outcome(rows=rows, log=text, why=why, is_refused=refused)


def _wait(
    process: "subprocess.Popen[bytes]", save: Path, steps: int, timeout_s: float
) -> str | None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        if time.monotonic() > deadline:
            return f"stopped after {timeout_s:.0f} s"
        rows = read_record(save)
        if rows and rows[-1]["iteration"] >= steps:
            return None
        time.sleep(0.2)
    return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for one in tree:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def read_record(save: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a run's record."""
    path = save / RECORD
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def reason(log: str) -> str:
    """Find the sentence with which a run ended, for a cell of a table."""
    found = REFUSAL.findall(log) or FAILURE.findall(log)
    words = found[-1] if found else (log.strip().splitlines() or ["no output"])[-1]
    return re.sub(r"\s+", " ", words).replace("|", "/")[:160]
