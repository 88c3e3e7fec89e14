"""Measure a store of targets: write and read rate and bytes per token of each form, and a peer.

The peer is what Megatron-LM's cached logits are: a tar of zstd-compressed (level 3) `torch.save`s,
one for each sequence, of fp16 log-probabilities, uint16 ids and a bool for the 17th bit. Both sides
force their files to the disk, and read them in order out of the page cache; ours checks the XXH3
of every record.
"""

import argparse
import hashlib
import io
import os
import platform
import shutil
import statistics
import tarfile
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from megatron_mlr1.ending import clean_exit
from megatron_mlr1.teacher.spec import Targets, TargetSpec, TeacherIdentity, layout
from megatron_mlr1.teacher.store import make_store, open_store

RESULT: Final = Path(__file__).parent / "results" / "teacher_store.md"
ROWS: Final = 4096
PEER: Final = "peer: tar of zstd(torch.save), top-64"
FORMS: Final = {
    "hidden (bf16)": TargetSpec(),
    "hidden_int8": TargetSpec(form="hidden_int8", seed=1),
    "hybrid (32 + 16)": TargetSpec(form="hybrid", k=32, m=16, seed=1),
    "top_k (64)": TargetSpec(form="top_k", k=64),
}
IDENTITY: Final = TeacherIdentity(
    fingerprint="0" * 32,
    name="shape-of-Llama-3.1-8B",
    tokenizer_sha256="0" * 64,
    vocab_size=128_256,
    hidden_size=4096,
    dtype="bfloat16",
    numerics="made up",
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run of one form took."""

    tokens: int
    bytes_on_disk: int
    write_s: float
    read_s: float


def make_targets(spec: TargetSpec, seed: int) -> Targets:
    """Make up targets of 4,096 tokens."""
    random = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    for array in layout(spec, IDENTITY, ROWS):
        if array.name == "ids":
            # Most ids low, as byte-pair vocabularies have them, and few alike in a row.
            made: NDArray[Any] = random.random(array.shape) ** 3 * IDENTITY.vocab_size
        elif array.name == "weights":
            logits = np.sort(random.normal(0, 3, array.shape))[:, ::-1]
            made = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) * 0.9
        elif array.dtype == np.dtype("<u2"):
            made = random.standard_normal(array.shape, "<f4").view("<u4") >> 16
        elif array.dtype == np.dtype("i1"):
            made = np.clip(random.normal(0, 32, array.shape), -127, 127)
        else:
            made = random.random(array.shape)
        arrays[array.name] = made.astype(array.dtype)
    return Targets(spec, arrays)


def key_of(number: int) -> bytes:
    """Make a content key."""
    return hashlib.blake2b(number.to_bytes(8), digest_size=16).digest()


def measure_ours(folder: Path, spec: TargetSpec, all_targets: list[Targets]) -> Figures:
    """Write and read a store."""
    store = make_store(folder, IDENTITY, spec)
    begin = time.perf_counter()
    for number, targets in enumerate(all_targets):
        store.add(key_of(number), targets)
    store.flush()
    write_s = time.perf_counter() - begin
    begin = time.perf_counter()
    reader = open_store(folder)
    for number, targets in enumerate(all_targets):
        found = reader.get(key_of(number), ROWS)
        assert found is not None, "what was written is there"
        assert found.num_bytes == targets.num_bytes, "and whole"
    read_s = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Figures(ROWS * len(all_targets), size, write_s, read_s)


def measure_peer(path: Path, all_targets: list[Targets]) -> Figures:
    """Write and read a tar as Megatron-LM's logits saver and loader do."""
    compressor = zstandard.ZstdCompressor(level=3)
    begin = time.perf_counter()
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for number, targets in enumerate(all_targets):
                ids = targets.arrays["ids"]
                record = {
                    "log_probs": torch.from_numpy(np.log(targets.arrays["weights"])).half(),
                    "low": torch.from_numpy(ids.astype(np.uint16)),
                    "high": torch.from_numpy(ids >> 16 != 0),
                }
                buffer = io.BytesIO()
                torch.save(record, buffer)
                data = compressor.compress(buffer.getvalue())
                entry = tarfile.TarInfo(f"{number}.pt.zst")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        file.flush()
        os.fsync(file.fileno())
    write_s = time.perf_counter() - begin
    begin = time.perf_counter()
    with tarfile.open(path) as tar:
        for entry in tar:
            member = tar.extractfile(entry)
            assert member is not None, "a file of the tar"
            data = zstandard.ZstdDecompressor().decompress(member.read())
            record = torch.load(io.BytesIO(data), weights_only=True)
            ids = record["low"].to(torch.int32) | (record["high"].to(torch.int32) << 16)
            assert ids.shape[0] == ROWS, "a whole sequence"
    read_s = time.perf_counter() - begin
    return Figures(ROWS * len(all_targets), path.stat().st_size, write_s, read_s)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[Figures]]:
    """Measure each form and the peer by turns."""
    figures: dict[str, list[Figures]] = {name: [] for name in (*FORMS, PEER)}
    for name, spec in FORMS.items():
        count = options.sequences if spec.is_sparse else max(options.sequences // 8, 1)
        all_targets = [make_targets(spec, seed) for seed in range(count)]
        for _ in range(options.repeat):
            figures[name].append(measure_ours(folder / "store", spec, all_targets))
            shutil.rmtree(folder / "store")
            if spec.form == "top_k":
                figures[PEER].append(measure_peer(folder / "peer.tar", all_targets))
    return figures


def table(figures: dict[str, list[Figures]], options: argparse.Namespace, load: float) -> str:
    """Give the medians as Markdown."""
    lines = [
        "# A store of targets",
        "",
        f"Sequences of {ROWS:,} tokens ({options.sequences} of the sparse forms, an eighth of "
        f"those of the others), teacher width {IDENTITY.hidden_size:,}, vocabulary "
        f"{IDENTITY.vocab_size:,}; medians of {options.repeat} runs.",
        "",
        "| | bytes a token | write MB/s | write tokens/s | read MB/s | read tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in figures.items():
        run = runs[0]
        write_s = statistics.median(one.write_s for one in runs)
        read_s = statistics.median(one.read_s for one in runs)
        lines.append(
            f"| {name} | {run.bytes_on_disk / run.tokens:.1f} "
            f"| {run.bytes_on_disk / write_s / 1e6:,.0f} | {run.tokens / write_s:,.0f} "
            f"| {run.bytes_on_disk / read_s / 1e6:,.0f} | {run.tokens / read_s:,.0f} |"
        )
    lines += [
        "",
        "Ours keeps the teacher's fp32 probabilities and the tail's; the peer keeps fp16 "
        "log-probabilities of the ids alone, and its loader also needs seed, batch sizes and "
        "layout of the run that wrote it. Writing includes forcing the files to the disk, reading "
        "the check of every record's XXH3 (of the peer: none).",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, load before the start {load:.1f}; Python "
        f"{platform.python_version()}, pyarrow {version('pyarrow')}, torch {version('torch')}, "
        f"zstandard {version('zstandard')}.",
        "",
        "Measured by `python -m benchmarks.bench_teacher_store --save`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64, help="sequences of the sparse forms")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each")
    parser.add_argument("--folder", type=Path, help="where the files may lie for a while")
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULT.name}")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), options)
    text = table(figures, options, load)
    print(text)
    if options.save:
        RESULT.write_text(text, "utf-8")


if __name__ == "__main__":
    with clean_exit():
        main()
