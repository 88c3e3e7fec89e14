"""Claim: the demo takes at most 6 minutes on 2 cores once the machine is set up.

Runs examples/quickstart/run.sh into a folder of its own and prints the seconds of each part.
`--save` keeps the table in benchmarks/results/.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_mlr1.ending import clean_exit

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "demo_time.md"
LIMIT_SECONDS = 360


def main() -> int:
    """Run the demo once, print the table; 1 where the demo failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULTS.name}")
    save = parser.parse_args().save
    with tempfile.TemporaryDirectory() as folder:
        before, start = os.getloadavg()[0], time.monotonic()
        demo = subprocess.run(
            ["bash", str(ROOT / "examples/quickstart/run.sh"), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            # Its `python` and `torchrun` are the ones beside this Python.
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        total = time.monotonic() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if demo.returncode:
            print(demo.stdout, file=sys.stderr)
            return 1
        parts = [
            line.split("\t") for line in (Path(folder) / "seconds.tsv").read_text().splitlines()
        ]
    text = "\n".join(table(parts, total, before, used.ru_utime + used.ru_stime))
    print(text)
    if save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text + "\n")
    return 0


def table(
    parts: Sequence[Sequence[str]], total: float, load: float, cpu_seconds: float
) -> list[str]:
    """Rows of the table, in Markdown."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        "# The demo's time",
        "",
        f"{platform.machine()}, {cores} cores, {device}; Python {platform.python_version()}, "
        f"torch {torch.__version__}. Load of the machine before the start: {load:.1f}. One run.",
        "",
        "| part | seconds |",
        "|---|---|",
        *(f"| {name} | {seconds} |" for name, seconds in parts),
        f"| **all** | **{total:.0f}** (limit {LIMIT_SECONDS}) |",
        f"| CPU time of all processes | {cpu_seconds:.0f} |",
    ]


if __name__ == "__main__":
    with clean_exit():
        sys.exit(main())
