"""Kill one replica of a pool with SIGKILL as soon as a run's record shows a step."""

import argparse
import json
import sys
import time
from pathlib import Path

import psutil

POLL_S = 0.1


def main() -> int:
    """Wait for the step, kill, and say so; 1 where the step or the replica does not come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pool", type=int, required=True, metavar="PID", help="its supervisor")
    parser.add_argument("--record", type=Path, required=True, metavar="FILE")
    parser.add_argument("--after", type=int, required=True, metavar="STEP")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    options = parser.parse_args()
    end = time.monotonic() + options.timeout
    while last_step(options.record) < options.after:
        if time.monotonic() > end:
            print(f"{options.record} never came to step {options.after}.", file=sys.stderr)
            return 1
        time.sleep(POLL_S)
    for process in psutil.Process(options.pool).children():
        if "megatron_mlr1.teacher.process" in process.cmdline():
            print(f"$ kill -KILL {process.pid}    # one of the three replicas", flush=True)
            process.kill()
            return 0
    print("The pool has no replica.", file=sys.stderr)
    return 1


def last_step(record: Path) -> int:
    """Give the last whole step of a record, 0 before the first."""
    lines = record.read_text().split("\n")[:-1] if record.exists() else []
    return int(json.loads(lines[-1])["iteration"]) if lines else 0


if __name__ == "__main__":
    sys.exit(main())
