"""Measure the packing of chats against the two methods that trainers commonly use.

First-fit decreasing puts each chat, longest first, into the first pack with room for it, searching
the packs in order. Filling in order puts the chats one after another and begins a pack where one
does not fit. All three get the same lengths, log-normal and cut at the pack's length, and run in
this process by turns; the memory is what Python and NumPy allocate at the most (tracemalloc),
taken in a run of its own.
"""

import argparse
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.packing import pack
from megatron_mlr1.ending import clean_exit

RESULT = Path(__file__).parent / "results" / "packing.md"
Method = Callable[[NDArray[np.int32], int], int]


def best_fit(lengths: NDArray[np.int32], pack_length: int) -> int:
    """Count the packs of ours."""
    return int(pack(lengths, pack_length, seed=0).sizes.size)


def first_fit(lengths: NDArray[np.int32], pack_length: int) -> int:
    """Count the packs of first-fit decreasing; each search over all open packs is vectorised."""
    room = np.full(lengths.size, pack_length, np.int32)
    opened = 0
    for length in np.sort(lengths)[::-1].tolist():
        at = int(np.argmax(room[: opened + 1] >= length))
        room[at] -= length
        opened = max(opened, at + 1)
    return opened


def in_order(lengths: NDArray[np.int32], pack_length: int) -> int:
    """Count the packs where chats are taken as they come."""
    packs, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            packs, room = packs + 1, pack_length
        room -= length
    return packs


def draw(chats: int, pack_length: int) -> NDArray[np.int32]:
    """Draw lengths with a median of a tenth of the pack and a long tail."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(pack_length / 10), 1.0, chats)
    return np.clip(lengths, 1, pack_length).astype(np.int32)


def measure(method: Method, lengths: NDArray[np.int32], pack_length: int, repeat: int) -> str:
    """Give a row: packs, how full, CPU seconds, and bytes a chat."""
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        packs = method(lengths, pack_length)
        seconds.append(time.process_time() - start)
    tracemalloc.start()
    method(lengths, pack_length)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    fill = int(lengths.sum(dtype=np.int64)) / (packs * pack_length)
    return f"{packs:,} | {fill:.2%} | {statistics.median(seconds):.2f} | {peak / lengths.size:.1f}"


def main() -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=1_000_000, help="chats for ours")
    parser.add_argument("--few", type=int, default=200_000, help="chats for all three")
    parser.add_argument("--pack-length", type=int, default=32_768)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each")
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULT.name}")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    methods: dict[str, Method] = {
        "ours, best-fit decreasing": best_fit,
        "first-fit decreasing": first_fit,
        "in order": in_order,
    }
    for chats, names in ((options.few, list(methods)), (options.chats, list(methods)[:1])):
        lengths = draw(chats, options.pack_length)
        for name in names:
            row = measure(methods[name], lengths, options.pack_length, options.repeat)
            rows.append(f"| {chats:,} | {name} | {row} |")
    text = "\n".join(
        [
            "# Packing chats",
            "",
            f"Packs of {options.pack_length:,} tokens; log-normal lengths; medians of "
            f"{options.repeat} runs.",
            "",
            "| chats | method | packs | full | CPU s | bytes a chat |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"{platform.machine()}, {os.cpu_count()} cores, load before the start {load:.1f}; "
            f"Python {platform.python_version()}, numpy {version('numpy')}. First-fit decreasing "
            "takes time in proportion to chats x packs, so it gets few.",
            "",
            "Measured by `python -m benchmarks.bench_packing --save`.",
            "",
        ]
    )
    print(text)
    if options.save:
        RESULT.write_text(text, "utf-8")


if __name__ == "__main__":
    with clean_exit():
        main()
