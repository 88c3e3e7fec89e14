"""Measure merging corpora of tiny documents against the engine's way.

Both run in processes of their own on the same files, by turns, and their bytes are compared. The
peer is what Megatron-LM's tools/merge_datasets.py does: `IndexedDatasetBuilder.add_index` for each
corpus, then `finalize`. Peaks are what the kernel counted for the process, libraries included.
"""

import argparse
import filecmp
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from megatron_mlr1.ending import clean_exit

RESULT: Final = Path(__file__).parent / "results" / "merge.md"
MEAN_TOKENS: Final = 20
SIDES: Final = ("engine", "ours")


@dataclass(frozen=True, slots=True)
class Run:
    """What one process took."""

    cpu_s: float
    """User and system time, with the start and the imports."""
    merge_cpu_s: float
    """The same without them."""
    merge_wall_s: float
    """Ours includes forcing the files to the disk, which the peer leaves to the system."""
    peak_bytes: int


def make_corpus(prefix: str, num_documents: int, seed: int) -> None:
    """Write documents of 1 to 39 random tokens."""
    import numpy as np

    from megatron_mlr1.data.index import DocumentBlock, IndexWriter, token_dtype

    random = np.random.default_rng(seed)
    lengths = random.integers(1, 2 * MEAN_TOKENS, num_documents)
    writer = IndexWriter(prefix, token_dtype(128256))
    tokens = random.integers(0, 128256, int(lengths.sum()))
    writer.write(DocumentBlock(tokens, lengths, np.ones(num_documents, np.int64)))
    writer.seal()
    writer.publish()


def merge_ours(prefixes: list[str], output: str) -> Run:
    """Merge with megatron_mlr1."""
    from megatron_mlr1.data.merge import merge

    start = _clocks()
    merge(prefixes, output)
    return _run_since(start)


def merge_by_engine(prefixes: list[str], output: str) -> Run:
    """Merge as Megatron-LM's tool does."""
    from megatron.core.datasets.indexed_dataset import (
        IndexedDataset,
        IndexedDatasetBuilder,
        get_bin_path,
        get_idx_path,
    )

    start = _clocks()
    dtype = IndexedDataset(prefixes[0]).index.dtype
    builder = IndexedDatasetBuilder(get_bin_path(output), dtype=dtype)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(get_idx_path(output))
    return _run_since(start)


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _run_since(start: tuple[float, float]) -> Run:
    cpu_s, wall_s = _clocks()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    # In KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(cpu_s, cpu_s - start[0], wall_s - start[1], usage.ru_maxrss * unit)


def measure(side: str, prefixes: list[str], output: str) -> Run:
    """Merge in a fresh process to files that are not there yet."""
    for kind in ("bin", "idx"):
        Path(f"{output}.{kind}").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--side", side, "--output", output, "--inputs", *prefixes]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def median(runs: list[Run]) -> Run:
    """Take the median of each figure."""
    return Run(
        cpu_s=statistics.median(run.cpu_s for run in runs),
        merge_cpu_s=statistics.median(run.merge_cpu_s for run in runs),
        merge_wall_s=statistics.median(run.merge_wall_s for run in runs),
        peak_bytes=int(statistics.median(run.peak_bytes for run in runs)),
    )


def table(options: argparse.Namespace, engine: Run, ours: Run, load: float) -> str:
    """Give the medians as Markdown, with the machine and the versions."""
    num_documents = options.shards * options.documents
    lines = [
        "# Merging corpora",
        "",
        f"{options.shards} corpora of {options.documents:,} documents of about {MEAN_TOKENS} "
        f"tokens (int32); medians of {options.repeat} runs each, by turns; same bytes.",
        "",
        "| | CPU s, whole program | CPU s, merge alone | wall s, merge alone "
        "| ns CPU a document | peak GB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {run.cpu_s:.2f} | {run.merge_cpu_s:.2f} | {run.merge_wall_s:.2f} "
            f"| {run.merge_cpu_s / num_documents * 1e9:.0f} | {run.peak_bytes / 1e9:.2f} |"
            for name, run in (
                ("engine: `IndexedDatasetBuilder` (Megatron-LM's tool)", engine),
                ("`tools/merge_data.py`", ours),
            )
        ),
        f"| ratio | {engine.cpu_s / ours.cpu_s:.1f}x "
        f"| {engine.merge_cpu_s / ours.merge_cpu_s:.1f}x "
        f"| {engine.merge_wall_s / ours.merge_wall_s:.1f}x | | "
        f"{engine.peak_bytes / ours.peak_bytes:.1f}x |",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, load before the start {load:.1f}; Python "
        f"{platform.python_version()}, numpy {version('numpy')}, megatron-core "
        f"{version('megatron-core')}. The wall time of ours includes forcing the files to the "
        "disk; the engine leaves that to the system. With longer documents both mostly copy "
        "tokens, and the ratio falls.",
        "",
        "Measured by `python -m benchmarks.bench_merge --save`.",
    ]
    return "\n".join(lines) + "\n"


def compare(options: argparse.Namespace) -> None:
    """Make the corpora, measure both sides, and print; fail where their bytes differ."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prefixes = [f"{folder}/shard{i}" for i in range(options.shards)]
        for seed, prefix in enumerate(prefixes):
            make = [sys.executable, __file__, "--side", "make", "--output", prefix]
            numbers = ["--documents", str(options.documents), "--seed", str(seed)]
            subprocess.run([*make, *numbers], check=True)
        runs: dict[str, list[Run]] = {side: [] for side in SIDES}
        for _ in range(options.repeat):
            for side in SIDES:
                runs[side].append(measure(side, prefixes, f"{folder}/{side}"))
        for kind in ("bin", "idx"):
            one, other = (f"{folder}/{side}.{kind}" for side in SIDES)
            if not filecmp.cmp(one, other, shallow=False):
                raise SystemExit(f"{one} and {other} differ")
    engine, ours = (median(runs[side]) for side in SIDES)
    text = table(options, engine, ours, load)
    print(text)
    if options.save:
        RESULT.write_text(text, "utf-8")


def main() -> None:
    """Compare, or be one of the processes that are compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=2, help="corpora to merge")
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents of each")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side")
    parser.add_argument("--folder", type=Path, help="where the files may lie for a while")
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULT.name}")
    for flag in ("--side", "--output", "--seed"):  # of the child processes
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--inputs", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is None:
        compare(options)
        return
    if options.side == "make":
        make_corpus(options.output, options.documents, int(options.seed))
        return
    merge = merge_ours if options.side == "ours" else merge_by_engine
    run = merge(options.inputs, options.output)
    print(json.dumps({name: getattr(run, name) for name in Run.__slots__}))


if __name__ == "__main__":
    with clean_exit():
        main()
