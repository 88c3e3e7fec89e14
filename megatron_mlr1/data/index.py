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

Both are little-endian. Source: `megatron/core/datasets/indexed_dataset.py` of Megatron-Core 0.19.
"""

import errno
import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data import disk
from megatron_mlr1.errors import DataError, MachineError

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


def meta_path(prefix: str) -> Path:
    """Name the record of a corpus; see `data/provenance.py`."""
    return Path(f"{prefix}.meta.json")


def partial_paths(prefix: str) -> tuple[Path, Path, Path, Path]:
    """Name the unfinished files: tokens, lengths, ends of the documents, and index."""
    bin_partial, lengths, documents, idx_partial = (
        Path(f"{prefix}.{kind}.partial") for kind in ("bin", "lengths", "documents", "idx")
    )
    return bin_partial, lengths, documents, idx_partial


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


@dataclass(frozen=True, slots=True)
class Counts:
    """How much of a corpus is written; `Counts(**asdict(c)) == c`."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexWriter:
    """Write one corpus as a stream; nothing has its final name before all of it lies on the disk.

    All is written as it comes, to `partial_paths`; `seal` puts the index together and forces all to
    the disk, `publish` renames, `discard` removes what is not finished, `suspend` leaves it to a
    later writer that resumes. Memory is constant.
    """

    def __init__(
        self,
        prefix: str,
        dtype: np.dtype[Any],
        *,
        overwrite: bool = False,
        resume: Counts | None = None,
        hashed: bool = False,
    ) -> None:
        """Open the corpus `prefix` for tokens of `dtype`.

        Args:
            prefix: the corpus.
            dtype: type of a token.
            overwrite: replace a corpus that is there, finished or not.
            resume: go on after so much of an unfinished corpus; the rest is cut off.
            hashed: compute the SHA-256 of both files on the way.

        Raises:
            ConfigError: the corpus, or an unfinished one, is there and `overwrite` is not set.
            DataError: what is to be resumed is shorter than that.
            MachineError: the folder is missing or cannot be written.
        """
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self.prefix = prefix
        self._bin, self._lengths, self._documents, self._idx = partial_paths(prefix)
        if not overwrite and resume is None:
            disk.refuse_existing(bin_path(prefix), idx_path(prefix), *partial_paths(prefix))
        start = resume or Counts()
        self.num_tokens, self.num_sequences = start.tokens, start.sequences
        self.num_documents = start.documents
        self.sha256: dict[str, str] = {}
        """After `seal`, where `hashed`: hexadecimal digits of `bin` and `idx`."""
        self._hash = hashlib.sha256() if hashed else None
        sizes = {self._bin: self.num_bytes, self._lengths: start.sequences * 4}
        sizes[self._documents] = start.documents * 8
        self._unfinished: list[Path] = [] if resume is None else list(sizes)
        self._files: dict[Path, BinaryIO] = {}
        # "x": of two runs that write the same corpus at once, one must not go on.
        mode: Literal["wb", "xb"] = "wb" if overwrite else "xb"
        new = resume is None
        try:
            for path, size in sizes.items():
                with disk.names_the_file(path):
                    left = self._unfinished
                    opened = disk.create(path, mode, left) if new else disk.reopen(path, size)
                    self._files[path] = opened
        except BaseException:
            self.discard() if new else self.suspend()
            raise
        if self._hash is not None and not new:
            with disk.names_the_file(self._bin):
                for block in disk.read_blocks(self._bin):
                    self._hash.update(block)

    @property
    def counts(self) -> Counts:
        """Tell how much is written."""
        return Counts(self.num_tokens, self.num_sequences, self.num_documents)

    @property
    def num_bytes(self) -> int:
        """Tell how large the file of the tokens is."""
        return self.num_tokens * self._dtype.itemsize

    def write(self, block: DocumentBlock) -> None:
        """Append documents.

        Raises:
            DataError, MachineError: as of `write_documents`.
        """
        assert block.lengths.sum() == block.tokens.size, "lengths must sum to the tokens"
        self._refuse_long(block.lengths)
        self.write_tokens(block.tokens)
        self.write_documents(block.lengths, block.sequences)

    def write_tokens(self, tokens: NDArray[Any]) -> None:
        """Append tokens whose documents `write_documents` tells later, for one in several parts.

        Raises:
            MachineError: the disk is full or failed.
        """
        data = np.ascontiguousarray(tokens, self._dtype).view(np.uint8).data
        with disk.names_the_file(self._bin):
            self._files[self._bin].write(data)
        if self._hash is not None:
            self._hash.update(data)
        self.num_tokens += tokens.size

    def write_documents(
        self, lengths: NDArray[np.integer[Any]], sequences: NDArray[np.integer[Any]]
    ) -> None:
        """Append documents whose tokens are written: (S,) lengths, (D,) sequences of each.

        Raises:
            DataError: a sequence is longer than the format can say (2**31 - 1 tokens).
            MachineError: the disk is full or failed.
        """
        self._refuse_long(lengths)
        assert sequences.sum() == lengths.size, "documents must hold all sequences"
        ends = self.num_sequences + np.cumsum(sequences, dtype="<i8")
        with disk.names_the_file(self._lengths):
            self._files[self._lengths].write(lengths.astype("<i4").tobytes())
        with disk.names_the_file(self._documents):
            self._files[self._documents].write(ends.tobytes())
        self.num_sequences += lengths.size
        self.num_documents += sequences.size

    def _refuse_long(self, lengths: NDArray[np.integer[Any]]) -> None:
        longest = int(lengths.max(initial=0))
        if longest > MAX_SEQUENCE_TOKENS:
            raise DataError(
                f"{bin_path(self.prefix)}: a document has {longest} tokens; the format holds at "
                f"most {MAX_SEQUENCE_TOKENS} a sequence. Split the document."
            )

    def flush(self) -> None:
        """Hand all to the operating system, so that `sync` forces it out.

        Raises:
            MachineError: the disk failed.
        """
        for path, file in self._files.items():
            with disk.names_the_file(path):
                file.flush()

    def sync(self) -> None:
        """Force what was flushed to the disk; another thread may write on meanwhile.

        Raises:
            MachineError: the disk failed.
        """
        for path, file in self._files.items():
            with disk.names_the_file(path):
                os.fsync(file.fileno())

    def seal(self) -> None:
        """Write the index and force all to the disk; the names stay `.partial`.

        Raises:
            MachineError: the disk is full or failed.
        """
        self.flush()
        self.sync()
        self.suspend()
        index_hash = hashlib.sha256() if self._hash is not None else None
        idx = self._idx
        with disk.names_the_file(idx), disk.create(idx, "wb", self._unfinished) as file:
            for part in self._index():
                file.write(part)
                if index_hash is not None:
                    index_hash.update(part)
            disk.flush_to_disk(file)
        if self._hash is not None and index_hash is not None:
            self.sha256 = {"bin": self._hash.hexdigest(), "idx": index_hash.hexdigest()}

    def _index(self) -> Iterator[bytes]:
        """Give the bytes of the index in blocks."""
        counts = self.num_sequences, self.num_documents + 1
        yield HEADER.pack(MAGIC, VERSION, CODES[self._dtype], *counts)
        yield from disk.read_blocks(self._lengths)
        begin = 0
        for block in disk.read_blocks(self._lengths):
            lengths = np.frombuffer(block, "<i4")
            ends = begin + np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
            yield (ends - lengths.astype("<i8") * self._dtype.itemsize).tobytes()
            begin = int(ends[-1])
        assert begin == self.num_tokens * self._dtype.itemsize, "lengths must sum to the tokens"
        yield bytes(8)
        yield from disk.read_blocks(self._documents)

    def publish(self) -> None:
        """Give both files their names, the index last: a corpus with an index is whole.

        Raises:
            MachineError: the rename failed.
        """
        try:
            publish_sealed(self.prefix)
        except MachineError:
            if not idx_path(self.prefix).exists():  # tokens without their index are no corpus
                self._unfinished.append(bin_path(self.prefix))
            raise
        self._unfinished.clear()

    def suspend(self) -> None:
        """Close, and leave what is written to a writer that resumes."""
        for file in self._files.values():
            with suppress(OSError):  # closing flushes, which fails again where the disk is full
                file.close()

    def discard(self) -> None:
        """Close and remove whatever is not finished; does nothing after `publish`."""
        self.suspend()
        disk.remove(self._unfinished)
        self._unfinished.clear()


def publish_sealed(prefix: str) -> None:
    """Give a sealed corpus its names, in place of what has them; may be called again at any point.

    Raises:
        MachineError: a rename failed.
    """
    tokens, lengths, documents, index = partial_paths(prefix)
    with disk.names_the_file(bin_path(prefix)):
        if index.exists():
            # An old index or record must not describe the new tokens, not even for a moment.
            meta_path(prefix).unlink(missing_ok=True)
            idx_path(prefix).unlink(missing_ok=True)
            if tokens.exists():
                tokens.replace(bin_path(prefix))
            index.replace(idx_path(prefix))
        elif not idx_path(prefix).exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(index))
        for path in (lengths, documents):
            path.unlink(missing_ok=True)
        disk.flush_folder_to_disk(idx_path(prefix).parent)


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

    Reads the header, three numbers of the index and the two sizes, whatever the corpus.

    Raises:
        DataError: a file is missing, is no index, is cut short, or does not fit the other.
    """
    path = idx_path(prefix)
    size = disk.file_size(path)
    with disk.names_the_file(path, DataError), path.open("rb") as file:
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
    size = disk.file_size(path)
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
