"""The `.bin`/`.idx` files of Megatron's indexed datasets: their bytes, and nothing else.

A corpus PREFIX is two files. `PREFIX.bin` holds the tokens of all sequences, one after another,
without a header. `PREFIX.idx` holds, of S sequences in D documents, without padding:

    bytes       what
    0-8         b"MMIDIDX\\0\\0"
    9-16        u64, version, 1
    17          u8, code of the token type (`DTYPES`)
    18-25       u64, S
    26-33       u64, D + 1
    34          i32[S], tokens of each sequence
    34 + 4S     i64[S], where each sequence begins in PREFIX.bin, in bytes
    34 + 12S    i64[D + 1], 0, then the number of sequences up to the end of each document;
                equal neighbours are an empty document

Both are little-endian. Source: `megatron/core/datasets/indexed_dataset.py` of Megatron-Core 0.19,
whose reader opens these files.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.errors import ConfigError, DataError, MachineError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
MAX_SEQUENCE_TOKENS = 2**31 - 1


def bin_path(prefix: str) -> Path:
    """Name the file of the tokens; a prefix may hold dots, so nothing is taken off it."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str) -> Path:
    """Name the file of the index."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Choose the type of a token by the number of ids, as Megatron does (`DType.optimal_dtype`)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True, slots=True)
class DocumentBlock:
    """Some documents in order: T tokens in S sequences in D documents."""

    tokens: NDArray[Any]
    """(T,): ids of all sequences, one after another."""
    lengths: NDArray[np.int64]
    """(S,): tokens of each sequence; they sum to T."""
    sequences: NDArray[np.int64]
    """(D,): sequences of each document, 0 for an empty one; they sum to S."""


class IndexWriter:
    """Write one corpus as a stream; nothing has its final name before all of it lies on the disk.

    Tokens are written as they come to `PREFIX.bin.partial`. `seal` writes `PREFIX.idx.partial` and
    forces both to the disk, `publish` renames them, `discard` removes what is not finished.
    Memory: 4 bytes a sequence and 8 bytes a document, whatever the number of tokens.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any], *, overwrite: bool = False) -> None:
        """Open the corpus `prefix` for tokens of `dtype`.

        Raises:
            ConfigError: the corpus, or an unfinished one, is there and `overwrite` is not set.
            MachineError: the folder is missing or cannot be written.
        """
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._code = CODES[self._dtype]
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        self._bin_partial = Path(f"{self._bin}.partial")
        self._idx_partial = Path(f"{self._idx}.partial")
        if not overwrite:
            refuse_existing(self._bin, self._idx, self._bin_partial, self._idx_partial)
        self._lengths: list[NDArray[np.int32]] = []
        self._document_ends = [np.zeros(1, np.int64)]
        self.num_tokens = 0
        self.num_sequences = 0
        self.num_documents = 0
        self._unfinished: list[Path] = []
        with names_the_file(self._bin_partial):
            # "x": of two runs that write the same corpus at once, one must not go on.
            self._file: BinaryIO = self._bin_partial.open("wb" if overwrite else "xb")
        self._unfinished.append(self._bin_partial)

    def write(self, block: DocumentBlock) -> None:
        """Append documents.

        Raises:
            DataError: a sequence is longer than the format can say (2**31 - 1 tokens).
            MachineError: the disk is full or failed.
        """
        longest = int(block.lengths.max(initial=0))
        if longest > MAX_SEQUENCE_TOKENS:
            raise DataError(
                f"{self._bin}: a document has {longest} tokens; the format holds at most "
                f"{MAX_SEQUENCE_TOKENS} a sequence. Split the document."
            )
        assert block.lengths.sum() == block.tokens.size, "lengths must sum to the tokens"
        assert block.sequences.sum() == block.lengths.size, "documents must hold all sequences"
        with names_the_file(self._bin_partial):
            self._file.write(block.tokens.astype(self._dtype, copy=False).tobytes())
        self._lengths.append(block.lengths.astype(np.int32))
        self._document_ends.append(self.num_sequences + np.cumsum(block.sequences))
        self.num_tokens += block.tokens.size
        self.num_sequences += block.lengths.size
        self.num_documents += block.sequences.size

    def seal(self) -> None:
        """Write the index and force both files to the disk; their names stay `.partial`.

        Raises:
            MachineError: the disk is full or failed.
        """
        with names_the_file(self._bin_partial):
            flush_to_disk(self._file)
            self._file.close()
        with names_the_file(self._idx_partial), self._idx_partial.open("wb") as file:
            self._unfinished.append(self._idx_partial)
            counts = self.num_sequences, self.num_documents + 1
            file.write(HEADER.pack(MAGIC, VERSION, self._code, *counts))
            for lengths in self._lengths:
                file.write(lengths.astype("<i4").tobytes())
            begin = 0
            for lengths in self._lengths:
                ends = begin + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
                begins = ends - lengths.astype(np.int64) * self._dtype.itemsize
                file.write(begins.astype("<i8").tobytes())
                begin = int(ends[-1]) if ends.size else begin
            for document_ends in self._document_ends:
                file.write(document_ends.astype("<i8").tobytes())
            flush_to_disk(file)

    def publish(self) -> None:
        """Give both files their names, the index last: a corpus with an index is whole.

        Raises:
            MachineError: the rename failed.
        """
        with names_the_file(self._bin):
            # An old index must not describe the new tokens, not even for a moment.
            self._idx.unlink(missing_ok=True)
            self._bin_partial.replace(self._bin)
            self._unfinished.append(self._bin)
            self._idx_partial.replace(self._idx)
            self._unfinished.clear()
            flush_folder_to_disk(self._idx.parent)

    def discard(self) -> None:
        """Close and remove whatever is not finished; does nothing after `publish`."""
        with suppress(OSError):  # closing flushes, which fails again where the disk is full
            self._file.close()
        for path in self._unfinished:
            path.unlink(missing_ok=True)
        self._unfinished.clear()


@dataclass(frozen=True, slots=True)
class Corpus:
    """An opened corpus; arrays are views of the mapped files, read when touched."""

    prefix: str
    tokens: NDArray[Any]
    """(T,): the tokens of all sequences."""
    lengths: NDArray[np.int32]
    """(S,): tokens of each sequence."""
    begins: NDArray[np.int64]
    """(S,): where each sequence begins in the file of the tokens, in bytes."""
    document_ends: NDArray[np.int64]
    """(D + 1,): 0, then the number of sequences up to the end of each document."""

    @property
    def num_documents(self) -> int:
        """Count the documents, empty ones too."""
        return self.document_ends.size - 1

    @property
    def num_tokens(self) -> int:
        """Count the tokens."""
        return self.tokens.size


def open_corpus(prefix: str) -> Corpus:
    """Map the corpus `prefix` and check that its two files are whole and belong together.

    Reads the header, three numbers of the index and the two sizes, so the cost does not depend on
    the size of the corpus.

    Raises:
        DataError: a file is missing, is no index, is cut short, or does not fit the other.
    """
    path = idx_path(prefix)
    with names_the_file(path, DataError):
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    dtype, num_sequences, num_ends = read_header(path, header)
    must_be = HEADER.size + 12 * num_sequences + 8 * num_ends
    if size != must_be:
        raise _broken(path, f"has {size} bytes where its header makes {must_be}")
    if num_sequences == 0 or num_ends == 0:
        raise _broken(path, "holds no tokens")
    index = np.memmap(path, mode="r")
    lengths = np.frombuffer(index, "<i4", num_sequences, HEADER.size)
    begins = np.frombuffer(index, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    ends = np.frombuffer(index, "<i8", num_ends, HEADER.size + 12 * num_sequences)
    if ends[0] != 0 or ends[-1] != num_sequences:
        raise _broken(path, f"ends its documents at {ends[-1]} of {num_sequences} sequences")
    num_bytes = int(begins[-1]) + int(lengths[-1]) * dtype.itemsize
    path = bin_path(prefix)
    with names_the_file(path, DataError):
        size = path.stat().st_size
    if size != num_bytes:
        raise _broken(path, f"has {size} bytes where its index makes {num_bytes}")
    return Corpus(prefix, np.memmap(path, dtype, mode="r"), lengths, begins, ends)


def read_header(path: Path, header: bytes) -> tuple[np.dtype[Any], int, int]:
    """Read the header of an index: type of a token, S, and D + 1.

    Raises:
        DataError: it is none of ours.
    """
    if len(header) < HEADER.size:
        raise _broken(path, f"has {len(header)} bytes where the header alone has {HEADER.size}")
    magic, version, code, num_sequences, num_ends = HEADER.unpack(header)
    if magic != MAGIC:
        raise _broken(path, f"begins with {magic!r} where an index begins with {MAGIC!r}")
    if version != VERSION:
        raise _broken(path, f"says version {version} where only {VERSION} is known")
    if code not in DTYPES:
        raise _broken(path, f"says token type {code} where only {sorted(DTYPES)} are known")
    return np.dtype(DTYPES[code]), num_sequences, num_ends


def _broken(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}. Make the corpus again with tools/preprocess_data.py.")


def refuse_existing(*paths: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: one of the paths exists.
    """
    for path in paths:
        if path.exists():
            raise ConfigError(
                f"{path} is there already, finished or from a run that goes on or was killed. "
                "Choose another --output-prefix, remove it, or say --overwrite."
            )


def flush_to_disk(file: BinaryIO) -> None:
    """Force what was written to a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder_to_disk(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def names_the_file(
    path: Path, kind: type[DataError] | type[MachineError] = MachineError
) -> Iterator[None]:
    """Turn an error of the operating system into ours, with the file's name.

    Raises:
        DataError, MachineError: by `kind`.
    """
    try:
        yield
    except OSError as error:
        raise kind(
            f"{path}: {error.strerror}. The corpus needs a folder that is there, may be written "
            "and has room; mend that and run again."
        ) from error
