"""Measure how fast batches come, against Megatron's GPTDataset and its DataLoader.

One corpus of random tokens, whose files lie in memory (page cache); both sides read it in the same
process, by turns. CPU time is that of the process and of the workers it started. A machine that is
busy with other things shows in the distance between median and best.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import psutil

from megatron_mlr1.data.dali import DaliLoader
from megatron_mlr1.data.feed import Feed, Reading, open_feed
from megatron_mlr1.data.index import DocumentBlock, IndexWriter
from megatron_mlr1.data.loader import Loader, Turns
from megatron_mlr1.data.mixture import Blend, ResolvedCorpus
from megatron_mlr1.data.rows import Rows, bytes_of
from megatron_mlr1.data.slabs import Slabs
from megatron_mlr1.ending import clean_exit
from megatron_mlr1.ops.extension import has_row

RESULT: Final = Path(__file__).parent / "results" / "loader.md"
VOCABULARY: Final = 128256
MEAN_DOCUMENT: Final = 760
BATCH: Final = 8
END: Final = 0
WARM_UP: Final = 8
"""Batches before the clock starts, in which workers start and files are opened."""
PAUSE_S: Final = 0.01
TOLLS: Final = 30
ALONE: Final = "`GPTDataset` alone"
BATCHES: Final = "`GPTDataset`, DataLoader, 0 workers"
THREAD: Final = "ours, `--mlr1-loader thread`"

Batches = Iterator[Any]


@dataclass(frozen=True, slots=True)
class Speed:
    """What one side did as fast as it could."""

    samples_per_s: float
    """By the wall clock."""
    cpu_us: float
    """User and system time of a sample, of the process and its workers, in microseconds."""


@dataclass(frozen=True, slots=True)
class Toll:
    """What a micro-batch takes of a training that asks for one every `PAUSE_S`."""

    cpu_us: float
    """Of the thread that asks, in microseconds."""
    wall_us: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one side."""

    median: Speed
    best: Speed
    toll: Toll


def make_corpus(prefix: str, num_tokens: int) -> None:
    """Write documents of 2 to about 1,500 random tokens, each with its end."""
    random = np.random.default_rng(0)
    lengths = random.integers(2, 2 * MEAN_DOCUMENT, num_tokens // MEAN_DOCUMENT)
    tokens = random.integers(1, VOCABULARY, int(lengths.sum()), dtype=np.int32)
    tokens[np.cumsum(lengths) - 1] = END
    writer = IndexWriter(prefix, np.dtype("<i4"))
    writer.write(DocumentBlock(tokens, lengths, np.ones(lengths.size, np.int64)))
    writer.seal()
    writer.publish()


def feed_of(prefix: str, length: int, *, mask: bool) -> Feed:
    """Open the corpus in our order."""
    corpus = ResolvedCorpus(name="corpus", weight=1.0, prefix=Path(prefix))
    reading = Reading(seq_length=length, seed=1, end=END if mask else None, num_ids=VOCABULARY)
    return open_feed([Blend(first_sample=0, corpora=(corpus,))], (0.0, 1.0), reading)


TURNS = Turns(consumed=0, rank=0, num_ranks=1, micro_batch=BATCH)


def ours_alone(prefix: str, length: int, *, mask: bool) -> Batches:
    """Fill batches in the thread that asks."""
    feed = feed_of(prefix, length, mask=mask)
    slabs = Slabs(bytes_of(BATCH, length))
    for turn in count():
        rows = Rows(BATCH, length, slabs.take())
        feed.fill(rows, TURNS.first_sample(turn))
        yield rows


def ours_loader(prefix: str, length: int, *, mask: bool) -> Batches:
    """Read ahead by a thread, as training does."""
    loader = Loader(feed_of(prefix, length, mask=mask), TURNS, length)
    try:
        yield from loader
    finally:
        loader.close()


def ours_dali(prefix: str, length: int, *, mask: bool) -> Batches:
    """The same through a DALI pipeline on the CPU."""
    loader = Loader(feed_of(prefix, length, mask=mask), TURNS, length)
    pipeline = DaliLoader(loader, BATCH, device=None)
    try:
        yield from pipeline
    finally:
        pipeline.close()


class Megatron:
    """The peer: its dataset, built once for each length, and its DataLoader."""

    def __init__(self, cache: str) -> None:
        """Keep the indices that it writes in a folder."""
        self._cache = cache
        self._built: dict[tuple[str, int, bool], Any] = {}

    def dataset(self, prefix: str, length: int, *, mask: bool) -> Any:
        """Build a GPTDataset of one epoch, as its training script does."""
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        key = (prefix, length, mask)
        if key not in self._built:
            tokenizer = SimpleNamespace(
                eod=END, pad=-1, vocab_size=VOCABULARY, unique_identifiers={"class": "none"}
            )
            config = GPTDatasetConfig(
                random_seed=1,
                sequence_length=length,
                blend=([prefix], None),
                split="1,0,0",
                path_to_cache=self._cache,
                tokenizer=tokenizer,
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=mask,
                create_attention_mask=False,
                inter_document_masking=mask,
            )
            sizes = [os.stat(f"{prefix}.bin").st_size // 4 // length - 1, 0, 0]
            built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
            self._built[key] = built[0]
        return self._built[key]

    def alone(self, prefix: str, length: int, *, mask: bool) -> Batches:
        """Take samples in the thread that asks, without a batch made of them."""
        dataset = self.dataset(prefix, length, mask=mask)
        for turn in count():
            yield [dataset[turn * BATCH + i] for i in range(BATCH)]

    def loader(self, workers: int) -> Callable[..., Batches]:
        """Give the engine's loader: torch's, with so many worker processes."""

        def batches(prefix: str, length: int, *, mask: bool) -> Batches:
            from torch.utils.data import DataLoader

            dataset = self.dataset(prefix, length, mask=mask)
            yield from DataLoader(dataset, batch_size=BATCH, num_workers=workers)

        return batches


def clocks() -> tuple[float, float]:
    """Give wall and CPU seconds, those of running workers too."""
    workers = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    of_workers = sum(times.user + times.system for times in workers)
    return time.perf_counter(), time.process_time() + of_workers


def measure(batches: Batches, num_samples: int) -> Speed:
    """Take samples off an iterator as fast as they come, then end it."""
    exhaust(islice(batches, WARM_UP))
    num_batches = num_samples // BATCH
    wall, cpu = clocks()
    exhaust(islice(batches, num_batches))
    wall_end, cpu_end = clocks()
    batches.close()  # type: ignore[attr-defined]  # they are generators
    num_samples = num_batches * BATCH
    return Speed(num_samples / (wall_end - wall), (cpu_end - cpu) / num_samples * 1e6)


def exhaust(batches: Batches) -> None:
    """Take all there are, and keep none."""
    for _ in batches:
        pass


def measure_toll(batches: Batches) -> Toll:
    """Ask for batches as a training does that computes elsewhere; the medians."""
    exhaust(islice(batches, WARM_UP))
    cpu, wall = [], []
    for _ in range(TOLLS):
        time.sleep(PAUSE_S)
        before = time.thread_time(), time.perf_counter()
        next(batches)
        cpu.append(time.thread_time() - before[0])
        wall.append(time.perf_counter() - before[1])
    batches.close()  # type: ignore[attr-defined]  # they are generators
    return Toll(statistics.median(cpu) * 1e6, statistics.median(wall) * 1e6)


def sides_of(megatron: Megatron) -> dict[str, tuple[Callable[..., Batches], int]]:
    """Name the sides: what starts each, and the divisor of its samples."""
    # Megatron is slow enough to be judged by fewer samples.
    sides: dict[str, tuple[Callable[..., Batches], int]] = {
        ALONE: (megatron.alone, 8),
        BATCHES: (megatron.loader(0), 8),
        "`GPTDataset`, DataLoader, 1 worker": (megatron.loader(1), 20),
        "`GPTDataset`, DataLoader, 2 workers": (megatron.loader(2), 20),
        "ours, without the thread": (ours_alone, 1),
        THREAD: (ours_loader, 1),
    }
    if importlib.util.find_spec("nvidia.dali") is not None:
        sides["ours, `--mlr1-loader dali` on the CPU"] = (ours_dali, 4)
    return sides


def figures(speeds: list[Speed], toll: Toll) -> Figures:
    """Take the median and the best of each figure."""
    rates = [speed.samples_per_s for speed in speeds]
    costs = [speed.cpu_us for speed in speeds]
    median = Speed(statistics.median(rates), statistics.median(costs))
    return Figures(median, Speed(max(rates), min(costs)), toll)


def compare(options: argparse.Namespace) -> dict[tuple[int, bool], dict[str, Figures]]:
    """Measure all sides by turns, for each length, without and with the document mask."""
    found: dict[tuple[int, bool], dict[str, Figures]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prefix = f"{folder}/corpus"
        make_corpus(prefix, options.tokens)
        megatron = Megatron(f"{folder}/cache")
        sides = sides_of(megatron)
        for length, mask in product(options.lengths, (False, True)):
            megatron.dataset(prefix, length, mask=mask)
            runs: dict[str, list[Speed]] = {side: [] for side in sides}
            for _ in range(options.repeat):
                for side, (start, part) in sides.items():
                    batches = start(prefix, length, mask=mask)
                    runs[side].append(measure(batches, options.samples // part))
            found[length, mask] = {
                side: figures(runs[side], measure_toll(start(prefix, length, mask=mask)))
                for side, (start, _) in sides.items()
            }
    return found


def section(length: int, speeds: dict[str, Figures], *, mask: bool) -> list[str]:
    """Give the lines of one length."""
    alone, batches, ours = (speeds[side] for side in (ALONE, BATCHES, THREAD))
    lines = [
        "",
        f"## {length:,} tokens, {'documents kept apart' if mask else 'plain'}",
        "",
        "| | samples/s, median (best) | of `GPTDataset` alone | CPU us a sample, median (best) "
        "| of `GPTDataset` alone | `next`: us of training's thread, CPU (wall) |",
        "|---|---|---|---|---|---|",
    ]
    for side, it in speeds.items():
        lines.append(
            f"| {side} | {it.median.samples_per_s:,.0f} ({it.best.samples_per_s:,.0f}) "
            f"| {it.median.samples_per_s / alone.median.samples_per_s:.1f}x "
            f"| {it.median.cpu_us:.1f} ({it.best.cpu_us:.1f}) "
            f"| 1/{alone.median.cpu_us / it.median.cpu_us:.1f} "
            f"| {it.toll.cpu_us:,.0f} ({it.toll.wall_us:,.0f}) |"
        )
    rate = ours.median.samples_per_s / batches.median.samples_per_s
    cost = batches.median.cpu_us / ours.median.cpu_us
    best = alone.best.cpu_us / ours.best.cpu_us, batches.best.cpu_us / ours.best.cpu_us
    lines += [
        "",
        f"Our thread against the DataLoader without workers, which makes batches as ours does: "
        f"{rate:.1f}x the samples/s, 1/{cost:.1f} of the CPU time. By the best runs, CPU time: "
        f"1/{best[0]:.1f} of `GPTDataset` alone, 1/{best[1]:.1f} of its batches.",
    ]
    return lines


def table(options: argparse.Namespace, found: Any, load: float) -> str:
    """Give the figures as Markdown, with the machine and the versions."""
    lines = [
        "# Batches",
        "",
        f"One corpus of {options.tokens / 1e6:.0f}M tokens (int32) in documents of about "
        f"{MEAN_DOCUMENT}, in the page cache; batches of {BATCH}; {options.repeat} runs each, by "
        "turns in one process. CPU time counts the workers too, without their start. `next` is "
        f"asked every {PAUSE_S * 1e3:.0f} ms, as a training would that computes elsewhere; its "
        f"figures are medians of {TOLLS}.",
    ]
    for (length, mask), speeds in found.items():
        lines += section(length, speeds, mask=mask)
    lines += [
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, load before the start {load:.1f}; Python "
        f"{platform.python_version()}, numpy {version('numpy')}, torch {version('torch')}, "
        f"megatron-core {version('megatron-core')}; compiled ops: "
        f"{'yes' if has_row('mlr1::document_rows', 'CPU') else 'no'}.",
        "",
        "`GPTDataset` alone gives samples and no batches; all other rows give batches. Kept apart "
        "means `--document-mask`: positions and bounds of each document.",
        "",
        "Measured by `python -m benchmarks.bench_loader --save`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=60_000_000, help="tokens of the corpus")
    parser.add_argument("--samples", type=int, default=8000, help="samples of each run of ours")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--repeat", type=int, default=5, help="runs of each side")
    parser.add_argument("--folder", type=Path, help="where the files may lie for a while")
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULT.name}")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    text = table(options, compare(options), load)
    print(text)
    if options.save:
        RESULT.write_text(text, "utf-8")


if __name__ == "__main__":
    with clean_exit():
        main()
