"""Runs of whole documents, copied from corpora to new ones in constant memory.

Joining, splitting and mending corpora all write new corpora of such runs. The tokens are copied by
the kernel where it can; the index is computed anew from lengths and documents, so where sequences
begin is right even if the source had it wrong. Files have the name `.partial` until all are whole.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.disk import (
    create,
    flush_folder_to_disk,
    flush_to_disk,
    names_the_file,
    refuse_existing,
    refuse_folders,
    refuse_little_room,
    refuse_nameless,
    remove,
)
from megatron_mlr1.data.index import (
    CODES,
    HEADER,
    MAGIC,
    VERSION,
    bin_path,
    idx_path,
    meta_path,
)
from megatron_mlr1.data.stored_index import StoredIndex
from megatron_mlr1.errors import ConfigError, DataError

STEP_BYTES = 1 << 26
"""The kernel copies this much between two reports of progress."""
BLOCK_BYTES = 1 << 22
"""Where the kernel cannot copy, this much is read and written at once."""
KERNEL_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}

OnProgress = Callable[[int], object]
"""Called with the bytes of tokens written since the last call."""


@dataclass(frozen=True, slots=True)
class Place:
    """A border between two documents of a corpus: what lies before it."""

    documents: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class DocumentRun:
    """The documents of one corpus between two places."""

    index: StoredIndex
    begin: Place
    end: Place

    @property
    def num_documents(self) -> int:
        """Count the documents, empty ones too."""
        return self.end.documents - self.begin.documents

    @property
    def num_sequences(self) -> int:
        """Count the sequences."""
        return self.end.sequences - self.begin.sequences

    @property
    def num_tokens(self) -> int:
        """Count the tokens."""
        return self.end.tokens - self.begin.tokens

    def lengths(self) -> Iterator[NDArray[np.int32]]:
        """Read the lengths of the sequences in blocks."""
        return self.index.lengths(self.begin.sequences, self.end.sequences)

    def document_ends(self) -> Iterator[NDArray[np.int64]]:
        """Read the ends of the documents in blocks, counted from the begin of the run."""
        first, last = self.begin.documents + 1, self.end.documents + 1
        for ends in self.index.document_ends(first, last):
            yield ends - self.begin.sequences


def whole_run(index: StoredIndex, num_tokens: int) -> DocumentRun:
    """Take all documents of a corpus."""
    end = Place(index.num_documents, index.num_sequences, num_tokens)
    return DocumentRun(index, Place(0, 0, 0), end)


@dataclass(frozen=True, slots=True)
class WrittenCorpus:
    """What a new corpus holds."""

    prefix: str
    num_documents: int
    num_sequences: int
    num_tokens: int
    dtype: np.dtype[Any]


def write_corpora(
    corpora: Mapping[str, Sequence[DocumentRun]], *, overwrite: bool, on_progress: OnProgress
) -> list[WrittenCorpus]:
    """Write new corpora, each of the runs given for its prefix, one after another.

    The runs of one corpus have one token type.

    Raises:
        ConfigError: a source would be overwritten, or something is there and `overwrite` is unset.
        DataError: a source became shorter.
        MachineError: a folder is missing, or the disk is full or failed.
    """
    for prefix, runs in corpora.items():
        refuse_nameless(prefix)
        for run in runs:
            refuse_source(prefix, run.index.prefix)
        paths = bin_path(prefix), idx_path(prefix)
        if not overwrite:
            refuse_existing(*paths, *map(_partial, paths))
        refuse_folders(*paths, *map(_partial, paths), meta_path(prefix))
    _refuse_full_disk(corpora)
    with ExitStack() as stack:
        drafts = []
        for prefix, runs in corpora.items():
            draft = _Draft(prefix, overwrite=overwrite)
            stack.callback(draft.discard)
            draft.write(runs, on_progress)
            drafts.append(draft)
        for draft in drafts:
            draft.publish()
    return [
        WrittenCorpus(
            prefix,
            sum(run.num_documents for run in runs),
            sum(run.num_sequences for run in runs),
            sum(run.num_tokens for run in runs),
            runs[0].index.dtype,
        )
        for prefix, runs in corpora.items()
    ]


class _Draft:
    """The two files of a new corpus, until they have their names."""

    def __init__(self, prefix: str, *, overwrite: bool) -> None:
        self._names = {path: _partial(path) for path in (bin_path(prefix), idx_path(prefix))}
        self._meta = meta_path(prefix)
        # "x": of two runs that write the same corpus at once, one must not go on.
        self._mode: Literal["wb", "xb"] = "wb" if overwrite else "xb"
        self._unfinished: list[Path] = []

    def write(self, runs: Sequence[DocumentRun], on_progress: OnProgress) -> None:
        tokens, index = self._names.values()
        with names_the_file(index), create(index, self._mode, self._unfinished) as file:
            _write_index(file, runs)
            flush_to_disk(file)
        with names_the_file(tokens), create(tokens, self._mode, self._unfinished, 0) as file:
            for run in runs:
                _copy_tokens(run, file.fileno(), on_progress)
            flush_to_disk(file)

    def publish(self) -> None:
        """Give both files their names, the index last: a corpus with an index is whole."""
        tokens, index = self._names
        with names_the_file(tokens):
            # An old index or record must not describe the new tokens, not even for a moment.
            self._meta.unlink(missing_ok=True)
            index.unlink(missing_ok=True)
            self._unfinished.append(tokens)
            self._names[tokens].replace(tokens)
            self._names[index].replace(index)
            self._unfinished.clear()
            flush_folder_to_disk(index.parent)

    def discard(self) -> None:
        remove(self._unfinished)


def _write_index(file: BinaryIO, runs: Sequence[DocumentRun]) -> None:
    dtype = runs[0].index.dtype
    num_sequences = sum(run.num_sequences for run in runs)
    num_ends = sum(run.num_documents for run in runs) + 1
    file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], num_sequences, num_ends))
    for run in runs:
        for lengths in run.lengths():
            file.write(lengths.data)
    begin = 0
    for run in runs:
        for lengths in run.lengths():
            begins = np.empty(lengths.size + 1, "<i8")
            begins[0] = begin
            np.cumsum(lengths, dtype="<i8", out=begins[1:])
            begins[1:] *= dtype.itemsize
            begins[1:] += begin
            file.write(begins[:-1].data)
            begin = int(begins[-1])
    file.write(bytes(8))
    before = 0
    for run in runs:
        for ends in run.document_ends():
            ends += before
            file.write(ends.data)
        before += run.num_sequences


def _copy_tokens(run: DocumentRun, target: int, on_progress: OnProgress) -> None:
    itemsize = run.index.dtype.itemsize
    path = bin_path(run.index.prefix)
    with names_the_file(path, DataError):
        source = os.open(path, os.O_RDONLY)
    try:
        if not copy_bytes(
            source, target, run.begin.tokens * itemsize, run.num_tokens * itemsize, on_progress
        ):
            raise DataError(f"{path} became shorter while it was read. Let it rest and run again.")
    finally:
        os.close(source)


def copy_bytes(source: int, target: int, begin: int, count: int, on_progress: OnProgress) -> bool:
    """Append bytes of one file to another, in the kernel where it can, else by blocks.

    Args:
        source: descriptor to read from, at `begin` bytes, `count` bytes.
        target: descriptor to write to, at its own position.
        on_progress: called with the bytes copied since the last call.

    Returns:
        Whether there were that many bytes.

    Raises:
        OSError: the disk is full or failed.
    """
    in_kernel = hasattr(os, "copy_file_range")
    while count:
        done = 0
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, min(count, STEP_BYTES), begin)
            except OSError as error:
                if error.errno not in KERNEL_CANNOT:
                    raise
        if not done:
            in_kernel = False
            block = os.pread(source, min(count, BLOCK_BYTES), begin)
            if not block:
                return False
            done = os.write(target, block)
        begin += done
        count -= done
        on_progress(done)
    return True


def _partial(path: Path) -> Path:
    return Path(f"{path}.partial")


def refuse_source(prefix: str, source: str) -> None:
    """Refuse to write a corpus over the one that is read.

    Raises:
        ConfigError: they are the same files.
        MachineError: it cannot be found out, since the name is too long for one.
    """
    for target_path, source_path in (
        (bin_path(prefix), bin_path(source)),
        (idx_path(prefix), idx_path(source)),
    ):
        with names_the_file(target_path):
            is_source = target_path.exists() and target_path.samefile(source_path)
        if is_source:
            raise ConfigError(
                f"{target_path} is read and would be written too. A corpus is never changed in "
                "place; choose another --output-prefix."
            )


def _refuse_full_disk(corpora: Mapping[str, Sequence[DocumentRun]]) -> None:
    needed = sum(
        HEADER.size
        + 12 * run.num_sequences
        + 8 * (run.num_documents + 1)
        + run.num_tokens * run.index.dtype.itemsize
        for runs in corpora.values()
        for run in runs
    )
    refuse_little_room(bin_path(next(iter(corpora))).parent, needed)
