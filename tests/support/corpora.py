"""Corpora of random documents, and damage done to them."""

import struct
from pathlib import Path

import numpy as np

from megatron_mlr1.data.index import HEADER, DocumentBlock, IndexWriter

MORE_THAN_A_BLOCK = 300_000
"""Sequences that need two blocks of an index."""


def write_corpus(
    prefix: Path, lengths: list[int], sequences: list[int], dtype: str = "<u2"
) -> None:
    """Write a corpus of random tokens below 60,000.

    Args:
        prefix: the corpus.
        lengths: tokens of each sequence.
        sequences: sequences of each document; they sum to the number of lengths.
        dtype: type of a token.
    """
    tokens = np.random.default_rng(len(lengths)).integers(0, 60_000, sum(lengths))
    writer = IndexWriter(str(prefix), np.dtype(dtype))
    writer.write(DocumentBlock(tokens, np.array(lengths, int), np.array(sequences, int)))
    writer.seal()
    writer.publish()


def write_random_corpus(prefix: Path, num_sequences: int, seed: int, dtype: str = "<u2") -> None:
    """Write documents of 0 to 2 sequences of 0 to 9 tokens; the last one has tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 10, num_sequences)
    lengths[-1] = 5
    ends = np.minimum(np.cumsum(random.integers(0, 3, num_sequences)), num_sequences)
    ends[-1] = num_sequences
    write_corpus(prefix, lengths.tolist(), np.diff(ends, prepend=0).tolist(), dtype)


def patch(path: Path, at: int, kind: str, *numbers: int) -> None:
    """Write numbers into a file; `kind` as in `struct`."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(f"<{len(numbers)}{kind}", *numbers))


def place(part: str, number: int, num_sequences: int) -> int:
    """Say where in an index a number of one of its parts stands, in bytes."""
    length, begin = HEADER.size, HEADER.size + 4 * num_sequences
    starts = {"length": (length, 4), "begin": (begin, 8), "end": (begin + 8 * num_sequences, 8)}
    start, size = starts[part]
    return start + size * number


def contents(prefix: Path) -> tuple[bytes, bytes]:
    """Read both files of a corpus."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def names(folder: Path) -> list[str]:
    """List a folder."""
    return sorted(path.name for path in folder.iterdir())
