"""Run a training command with its log in a file, and show here a line for each evaluation.

With `--terminate-after N` one of its processes gets SIGTERM after step N, as from a scheduler that
takes the machine back: the engine tells the other processes, all save, and the command ends well.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

STARTS = re.compile(r"^\S+ \S+ (?:starts from|goes on from) .*")
STEP = re.compile(r"iteration +(?P<step>\d+)/ *(?P<steps>\d+) .*\| lm loss: (?P<loss>\S+)")
SPEED = re.compile(r"iteration +(?P<step>\d+) .* tokens/s: (?P<speed>\S+)")
VALIDATION = re.compile(
    r"validation loss at iteration (?P<step>\d+) \| lm loss value: (?P<loss>\S+)"
)
FAULT = re.compile(r"error: |\w*Error: ")
HEADER = "      step   training loss   tokens/s   validation loss"


def main() -> int:
    """Run the command to its end; give its exit status, or 1 where the loss did not fall."""
    options = _parser().parse_args()
    watch = Watch(options.record, options.terminate_after)
    command = [word for word in options.command if word != "--"]
    with (
        options.log.open("a", buffering=1) as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None, "a pipe was asked for"
        faults = []
        for line in process.stdout:
            log.write(line)
            faults += [line.strip()] if FAULT.search(line) else []
            for text in watch.read(line, process.pid):
                print(text, flush=True)
    if process.returncode:
        print(f"Training failed with status {process.returncode}:", file=sys.stderr)
        print(
            *(faults[:5] or ["(no message)"]),
            f"All of it: {options.log}",
            sep="\n  ",
            file=sys.stderr,
        )
        return process.returncode
    return 0 if options.must_fall is None else judge(options.record, options.must_fall)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--record",
        type=Path,
        required=True,
        metavar="FILE",
        help="validation losses, as JSON lines",
    )
    parser.add_argument("--terminate-after", type=int, metavar="N", help="steps before a SIGTERM")
    parser.add_argument(
        "--must-fall",
        type=float,
        metavar="NATS",
        help="fail where the last validation loss is not so far below the first",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser


class Watch:
    """Turns the lines of the engine's log into the few that are shown."""

    def __init__(self, record: Path, terminate_after: int | None) -> None:
        """Take the file for validation losses, and the step after which to stop the run."""
        self._record = record
        self._terminate_after = terminate_after
        self._loss = self._speed = ""

    def read(self, line: str, launcher: int) -> Iterator[str]:
        """Read a line of the log of the process `launcher`; yield what to show."""
        if STARTS.match(line):
            yield line.strip()
            yield HEADER
        if step := STEP.search(line):
            self._loss = f"{float(step['loss']):.3f}"
        if speed := SPEED.search(line):
            self._speed = speed["speed"]
        if found := VALIDATION.search(line):
            number, loss = int(found["step"]), float(found["loss"])
            with self._record.open("a") as record:
                record.write(json.dumps({"iteration": number, "validation_loss": loss}) + "\n")
            yield f"{number:>10}{self._loss:>16}{self._speed:>11}{loss:>18.3f}"
            if self._terminate_after is not None and number >= self._terminate_after:
                self._terminate_after = None
                yield from terminate(launcher)


def terminate(launcher: int) -> Iterator[str]:
    """Send SIGTERM to one training process of a launcher; yield the command that would do it."""
    for process in psutil.Process(launcher).children():
        if "megatron_mlr1.train" in process.cmdline():
            yield f"$ kill -TERM {process.pid}    # one of the training processes"
            process.send_signal(signal.SIGTERM)
            return


def judge(record: Path, must_fall: float) -> int:
    """Compare the first and the last validation loss; give the exit status."""
    losses = [json.loads(line)["validation_loss"] for line in record.read_text().splitlines()]
    first, last = losses[0], losses[-1]
    print(f"validation loss: {first:.3f} at first, {last:.3f} at last")
    if first - last >= must_fall:
        return 0
    print(f"It must fall by {must_fall}; something is wrong with this run.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
