"""Measure how a run's order of samples starts, against Megatron's blended dataset.

Both start in processes of their own on the same files, by turns: many corpora, an index of real
size each, tokens without content (neither side reads any). Ours also starts at the scale of a large
run, where the indices are sparse files, and gives the time of a sample, compiled and by definition.
Times and memory are what the start adds to a process that has imported its libraries.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Final

from megatron_mlr1.ending import clean_exit

RESULT: Final = Path(__file__).parent / "results" / "sampler.md"
MEAN_TOKENS: Final = 1000
SEQ_LENGTH: Final = 2048
SEED: Final = 1234
NUM_BYTES: Final = 4
LARGE_DOCUMENTS: Final = 40_000_000
"""Documents of each of 50 corpora of 2T tokens."""
BLOCK: Final = 65_536
NUM_BLOCKS: Final = 30


@dataclass(frozen=True, slots=True)
class Run:
    """What a start took."""

    wall_s: float
    cpu_s: float
    memory_bytes: int
    """Growth of the process to its peak."""
    cache_bytes: int
    """On the disk afterwards."""


def make_corpus(prefix: str, num_documents: int, seed: int) -> None:
    """Write an index of documents of 1 to 1,999 tokens, and a file of as many without content."""
    import numpy as np

    from megatron_mlr1.data.index import CODES, HEADER, MAGIC, VERSION, bin_path, idx_path

    lengths = np.random.default_rng(seed).integers(1, 2 * MEAN_TOKENS, num_documents)
    ends = np.cumsum(lengths * NUM_BYTES)
    with idx_path(prefix).open("wb") as file:
        counts = num_documents, num_documents + 1
        file.write(HEADER.pack(MAGIC, VERSION, CODES[np.dtype("<i4")], *counts))
        file.write(lengths.astype("<i4").tobytes())
        file.write((ends - lengths * NUM_BYTES).astype("<i8").tobytes())
        file.write(np.arange(num_documents + 1, dtype="<i8").tobytes())
    with bin_path(prefix).open("wb") as file:
        file.truncate(int(ends[-1]))


def make_outline(prefix: str, num_documents: int) -> None:
    """Write sparse files of the right sizes, with the numbers of the index that a start reads."""
    import numpy as np

    from megatron_mlr1.data.index import CODES, HEADER, MAGIC, VERSION, bin_path, idx_path

    num_bytes = num_documents * MEAN_TOKENS * NUM_BYTES
    last = num_documents - 1
    with idx_path(prefix).open("wb") as file:
        counts = num_documents, num_documents + 1
        file.write(HEADER.pack(MAGIC, VERSION, CODES[np.dtype("<i4")], *counts))
        file.seek(HEADER.size + 4 * last)
        file.write(np.array([MEAN_TOKENS], "<i4").tobytes())
        file.seek(HEADER.size + 4 * num_documents + 8 * last)
        file.write(np.array([num_bytes - MEAN_TOKENS * NUM_BYTES], "<i8").tobytes())
        file.seek(HEADER.size + 12 * num_documents + 8 * num_documents)
        file.write(np.array([num_documents], "<i8").tobytes())
    with bin_path(prefix).open("wb") as file:
        file.truncate(num_bytes)


def weights_of(prefixes: list[str]) -> list[float]:
    """Give unequal weights, the last corpus the heaviest."""
    return [1.0 + number for number in range(len(prefixes))]


def start_ours(prefixes: list[str], num_samples: int, cache: Path) -> Callable[[], object]:
    """Prepare a start of our order, up to its first samples; it needs no cache."""
    from megatron_mlr1.data.sampler import SampleOrder, Stream
    from megatron_mlr1.data.streams import part_of

    def start() -> object:
        streams = [
            Stream(
                name=Path(prefix).name,
                key=Path(prefix).name,
                weight=weight,
                num_items=part_of(prefix, 0.0, 1.0).num_items(SEQ_LENGTH),
            )
            for prefix, weight in zip(prefixes, weights_of(prefixes), strict=True)
        ]
        order = SampleOrder(streams, SEED)
        return order, order.places(num_samples - 8, 8), order.counts(num_samples)

    return start


def start_engine(prefixes: list[str], num_samples: int, cache: Path) -> Callable[[], object]:
    """Prepare a start of the engine's blended dataset, with a cache that is empty or not."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer = SimpleNamespace(
        eod=0, pad=-1, vocab_size=128256, unique_identifiers={"class": "none"}
    )

    def start() -> object:
        config = GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=SEQ_LENGTH,
            blend=(prefixes, weights_of(prefixes)),
            split="1,0,0",
            path_to_cache=str(cache),
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sizes = [num_samples, 0, 0]
        config.split_matrix = [config.split_matrix[0], None, None]
        train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
        assert len(train) >= num_samples, "the engine built fewer samples than were asked for"
        return train

    return start


def measure(start: Callable[[], object], cache: Path) -> Run:
    """Start once in this process."""
    before = _resident_bytes()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    kept = start()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    # In KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    del kept
    cached = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return Run(wall_s, cpu_s, max(peak - before, 0), cached)


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def nanoseconds_a_sample() -> dict[str, float]:
    """Time the order of 50 corpora at places spread over 1e9 samples: median of blocks, in ns."""
    import numpy as np
    import torch

    from megatron_mlr1.data.blend import blend
    from megatron_mlr1.ops.extension import has_row
    from megatron_mlr1.ops.sample_order import sample_order, sample_order_reference

    it = blend([1.0 + number for number in range(50)])
    arguments = (
        torch.from_numpy(it.tree),
        torch.zeros(50, dtype=torch.int64),
        torch.arange(50) + 20_000_000,
        torch.from_numpy(np.random.default_rng(0).integers(0, 2**62, 50)),
        it.root,
    )
    ops = {"by definition (NumPy)": sample_order_reference}
    if has_row("mlr1::sample_order", "CPU"):
        ops["compiled"] = sample_order
    taken: dict[str, list[float]] = {name: [] for name in ops}
    for first in np.linspace(0, 10**9, NUM_BLOCKS).astype(int).tolist():
        for name, op in ops.items():
            begin = time.process_time()
            op(*arguments, first, BLOCK)
            taken[name].append((time.process_time() - begin) / BLOCK * 1e9)
    return {name: statistics.median(times) for name, times in taken.items()}


def in_a_process(side: str, folder: str, num_samples: int, cache: str) -> Run:
    """Start in a fresh process on all corpora of a folder."""
    command = [sys.executable, __file__, "--side", side, "--folder", folder]
    numbers = ["--samples", str(num_samples), "--cache", cache]
    done = subprocess.run([*command, *numbers], check=True, stdout=subprocess.PIPE, text=True)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def median(runs: list[Run]) -> Run:
    """Take the median of each figure."""
    columns = zip(*(asdict(run).values() for run in runs), strict=True)
    wall_s, cpu_s, memory, cache = (statistics.median(column) for column in columns)
    return Run(wall_s, cpu_s, int(memory), int(cache))


def table(
    options: argparse.Namespace, rows: dict[str, Run], speeds: dict[str, float], load: float
) -> str:
    """Give the figures as Markdown, with the machine and the versions."""
    cold, ours = rows["cold"], rows["ours"]
    many = f"medians of {options.repeat} starts each, by turns"
    starts = many if options.repeat > 1 else "one start each"
    names = {
        "cold": "engine: `GPTDataset`, `BlendedDataset`, no cache yet",
        "warm": "the same, cache there",
        "ours": "`SampleOrder`, same files",
        "large": f"`SampleOrder`, {options.corpora} corpora of {LARGE_DOCUMENTS:,} documents, "
        f"{_large_samples(options.corpora):,} samples",
    }
    lines = [
        "# Starting the order of samples",
        "",
        f"{options.corpora} corpora of {options.documents:,} documents of about {MEAN_TOKENS:,} "
        f"tokens, {_samples(options):,} samples of {SEQ_LENGTH:,} tokens; "
        f"{starts}. Memory is the growth of the process to its peak.",
        "",
        "| | wall s | CPU s | memory MB | cache on disk MB |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {rows[key].wall_s:.3f} | {rows[key].cpu_s:.3f} "
            f"| {rows[key].memory_bytes / 1e6:.1f} | {rows[key].cache_bytes / 1e6:.0f} |"
            for key, name in names.items()
        ),
        f"| ratio, no cache yet, same files | {cold.wall_s / ours.wall_s:.0f}x "
        f"| {cold.cpu_s / ours.cpu_s:.0f}x | | |",
        "",
        "The start of ours includes opening and checking every corpus, the last 8 samples of the "
        "run and the count of all samples by corpus.",
        "",
        "| one sample of 50 corpora, between sample 0 and 1e9, one thread | ns CPU | samples/s |",
        "|---|---|---|",
        *(f"| {name} | {ns:.0f} | {1e9 / ns:,.0f} |" for name, ns in speeds.items()),
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, load before the start {load:.1f}; Python "
        f"{platform.python_version()}, torch {version('torch')}, numpy {version('numpy')}, "
        f"megatron-core {version('megatron-core')}.",
        "",
        f"Measured by `python -m benchmarks.bench_sampler --documents {options.documents} "
        f"--repeat {options.repeat} --save`.",
    ]
    return "\n".join(lines) + "\n"


def _samples(options: argparse.Namespace) -> int:
    """Samples of about one epoch of all."""
    return int(options.corpora * options.documents * MEAN_TOKENS / SEQ_LENGTH)


def _large_samples(num_corpora: int) -> int:
    return num_corpora * LARGE_DOCUMENTS * MEAN_TOKENS // SEQ_LENGTH


def compare(options: argparse.Namespace) -> None:
    """Make the corpora, measure all, and print."""
    load = os.getloadavg()[0]
    runs: dict[str, list[Run]] = {"cold": [], "warm": [], "ours": [], "large": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        same, large = Path(folder, "same"), Path(folder, "large")
        for number in range(options.corpora):
            for place in (same, large):
                place.mkdir(exist_ok=True)
            make_corpus(f"{same}/c{number:03}_text_document", options.documents, number)
            make_outline(f"{large}/c{number:03}_text_document", LARGE_DOCUMENTS)
        many, none = _large_samples(options.corpora), f"{folder}/none"
        for number in range(options.repeat):
            cache = f"{folder}/cache{number}"
            for key in ("cold", "warm"):
                runs[key].append(in_a_process("engine", str(same), _samples(options), cache))
            runs["ours"].append(in_a_process("ours", str(same), _samples(options), none))
            runs["large"].append(in_a_process("ours", str(large), many, none))
    rows = {key: median(found) for key, found in runs.items()}
    text = table(options, rows, nanoseconds_a_sample(), load)
    print(text)
    if options.save:
        RESULT.write_text(text, "utf-8")


def main() -> None:
    """Compare, or be one of the processes that are compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=int, default=50)
    parser.add_argument("--documents", type=int, default=200_000, help="documents of each corpus")
    parser.add_argument("--repeat", type=int, default=3, help="starts of each side")
    parser.add_argument("--folder", type=Path, help="where the files may lie for a while")
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULT.name}")
    for flag in ("--side", "--samples", "--cache"):  # of the child processes
        parser.add_argument(flag, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is None:
        compare(options)
        return
    prefixes = sorted(str(path.with_suffix("")) for path in options.folder.glob("*.idx"))
    prepare = start_ours if options.side == "ours" else start_engine
    cache = Path(options.cache)
    run = measure(prepare(prefixes, int(options.samples), cache), cache)
    print(json.dumps(asdict(run)))


if __name__ == "__main__":
    with clean_exit():
        main()
