"""An index on the disk, read in blocks: constant memory whatever the corpus, and what is wrong.

`index.open_corpus` maps a corpus that is whole. Here a corpus may be larger than the memory or
damaged; each `refuse_...` reads one part of it once and names the first fault.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.disk import file_size, names_the_file
from megatron_mlr1.data.index import HEADER, bin_path, idx_path, read_header
from megatron_mlr1.errors import DataError

BLOCK_NUMBERS = 1 << 16
"""Numbers read at once: 256 to 512 KiB, which a core keeps in its cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredIndex:
    """S sequences in D documents, as the header of an index counts them."""

    prefix: str
    dtype: np.dtype[Any]
    """Type of a token."""
    num_sequences: int
    num_documents: int
    bin_bytes: int
    """Size of the file of the tokens."""
    documents_are_sequences: bool = False
    """Take each sequence as a document, and leave what the file says of documents unread."""

    def lengths(self, begin: int = 0, end: int | None = None) -> Iterator[NDArray[np.int32]]:
        """Read blocks of i32: tokens of the sequences from `begin` up to `end` (default S)."""
        stop = self.num_sequences if end is None else end
        return self._blocks("<i4", HEADER.size, begin, stop)

    def begins(self) -> Iterator[NDArray[np.int64]]:
        """Read blocks of i64: where each sequence begins in the file of the tokens, in bytes."""
        return self._blocks("<i8", HEADER.size + 4 * self.num_sequences, 0, self.num_sequences)

    def document_ends(self, begin: int = 0, end: int | None = None) -> Iterator[NDArray[np.int64]]:
        """Read blocks of i64: sequences up to the end of `begin` ... `end - 1` documents.

        All of them (0 to D + 1) are 0, then one number for each document.
        """
        stop = self.num_documents + 1 if end is None else end
        if self.documents_are_sequences:
            return _count(begin, stop)
        return self._blocks("<i8", HEADER.size + 12 * self.num_sequences, begin, stop)

    def totals(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pair blocks of `document_ends` (without the 0) with the tokens up to each end.

        The ends must be in order; see `refuse_wrong_documents`.
        """
        blocks = self.lengths()
        first = 0
        tokens = np.zeros(1, np.int64)  # up to sequence first, first + 1, ...
        for ends in self.document_ends(1):
            while ends.size:
                here = int(np.searchsorted(ends, first + tokens.size - 1, side="right"))
                if here:
                    yield ends[:here], tokens[ends[:here] - first]
                    ends = ends[here:]
                else:
                    first += tokens.size - 1
                    ahead = tokens[-1] + np.cumsum(next(blocks), dtype=np.int64)
                    tokens = np.concatenate([tokens[-1:], ahead])

    def _blocks(self, kind: str, start: int, begin: int, end: int) -> Iterator[NDArray[Any]]:
        path = idx_path(self.prefix)
        with names_the_file(path, DataError), path.open("rb") as file:
            file.seek(start + begin * np.dtype(kind).itemsize)
            while begin < end:
                block = np.fromfile(file, kind, min(BLOCK_NUMBERS, end - begin))
                if not block.size:
                    raise DataError(f"{path} became shorter while it was read. Let it rest.")
                yield block
                begin += block.size


def _count(begin: int, end: int) -> Iterator[NDArray[np.int64]]:
    for first in range(begin, end, BLOCK_NUMBERS):
        yield np.arange(first, min(first + BLOCK_NUMBERS, end), dtype=np.int64)


def read_counts(prefix: str) -> tuple[StoredIndex, int]:
    """Read the header of an index, and give the size that the file has.

    Raises:
        DataError: a file is missing or its header is none.
    """
    path, tokens = idx_path(prefix), bin_path(prefix)
    bin_bytes, size = file_size(tokens), file_size(path)
    with names_the_file(path, DataError), path.open("rb") as file:
        header = file.read(HEADER.size)
    dtype, num_sequences, num_ends = read_header(path, header)
    index = StoredIndex(
        prefix=prefix,
        dtype=dtype,
        num_sequences=num_sequences,
        num_documents=num_ends - 1,
        bin_bytes=bin_bytes,
    )
    return index, size


def open_index(prefix: str) -> StoredIndex:
    """Open the index of a corpus whose header fits its size.

    Raises:
        DataError: a file is missing, its header is none, or the index is cut short.
    """
    index, size = read_counts(prefix)
    path = idx_path(prefix)
    must_be = HEADER.size + 12 * index.num_sequences + 8 * (index.num_documents + 1)
    if size == must_be + index.num_sequences != must_be:
        raise DataError(
            f"{path} has modes of its sequences: it is a multimodal corpus, and this program is "
            "for text alone. Use Megatron-LM's tools for it."
        )
    if size != must_be or index.num_documents < 0:
        raise damaged(path, f"has {size} bytes where its header makes {must_be}")
    return index


def count_tokens(index: StoredIndex) -> int:
    """Add up the lengths.

    Raises:
        DataError: one is negative.
    """
    total = first = 0
    for lengths in index.lengths():
        if lengths.min() < 0:
            at = int(np.argmax(lengths < 0))
            raise DataError(
                f"{idx_path(index.prefix)} gives sequence {first + at} the length {lengths[at]}. "
                "Nothing can mend it; make the corpus again with tools/preprocess_data.py."
            )
        total += int(lengths.sum(dtype=np.int64))
        first += lengths.size
    return total


def refuse_wrong_size(index: StoredIndex, num_tokens: int) -> None:
    """Check that the file of the tokens is as long as its index says.

    Raises:
        DataError: it is shorter or longer.
    """
    must_be = num_tokens * index.dtype.itemsize
    if index.bin_bytes != must_be:
        raise damaged(
            bin_path(index.prefix), f"has {index.bin_bytes} bytes where its index makes {must_be}"
        )


def refuse_wrong_documents(index: StoredIndex) -> None:
    """Check that the ends of the documents begin with 0, never fall, and end with S.

    Raises:
        DataError: they do not; names the first document.
    """
    path = idx_path(index.prefix)
    before, document = 0, -1
    for ends in index.document_ends():
        if document < 0 and ends[0] != 0:
            raise damaged(path, f"begins its documents at sequence {ends[0]} where 0 must stand")
        falls = ends[1:] < ends[:-1]
        if ends[0] < before or falls.any():
            at = 0 if ends[0] < before else int(np.argmax(falls)) + 1
            begin = int(ends[at - 1]) if at else before
            raise damaged(
                path, f"ends document {document + at} at {ends[at]}, before its begin {begin}"
            )
        before, document = int(ends[-1]), document + ends.size
    if before != index.num_sequences:
        raise damaged(path, f"ends its documents at {before} of {index.num_sequences} sequences")


def refuse_wrong_begins(index: StoredIndex) -> None:
    """Check that each sequence begins where the one before it ends.

    Raises:
        DataError: one does not; names the first.
    """
    end = first = 0
    for lengths, begins in zip(index.lengths(), index.begins(), strict=True):
        ends = end + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        must_be = np.concatenate([[end], ends[:-1]])
        wrong = begins != must_be
        if wrong.any():
            at = int(np.argmax(wrong))
            raise damaged(
                idx_path(index.prefix),
                f"begins sequence {first + at} at byte {begins[at]} where the lengths make "
                f"{must_be[at]}",
            )
        end, first = int(ends[-1]), first + lengths.size


def damaged(path: Path, what: str) -> DataError:
    """Say what is wrong with a file, and what may mend it."""
    return DataError(
        f"{path} {what}. Make the corpus again with tools/preprocess_data.py, or see whether "
        "tools/repair_data.py can mend it."
    )
