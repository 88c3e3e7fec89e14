"""The files of a corpus of packs while it is made: the spill, what is left out, and the packs."""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.chat_encode import TARGET, EncodedChats, Refused
from megatron_mlr1.data.disk import flush_to_disk, names_the_file, remove
from megatron_mlr1.data.index import DocumentBlock, IndexWriter, meta_path
from megatron_mlr1.data.packing import Packs
from megatron_mlr1.data.provenance import CorpusRecord, FileRecord, record_file, write_record
from megatron_mlr1.errors import DataError

BLOCK_TOKENS = 1 << 22
"""About as many tokens of packs are put together at once."""


def loss_path(prefix: str) -> Path:
    """Name the file that says which tokens are targets: a byte for each, 1 where it is one."""
    return Path(f"{prefix}.loss.bin")


class Spill:
    """All chats in the order of the input, as words: ids with their targets marked."""

    def __init__(self, path: Path) -> None:
        """Begin a file.

        Raises:
            MachineError: it cannot be written.
        """
        self._path = path
        self._lengths = array("i")
        with names_the_file(path):
            self._file: BinaryIO = path.open("w+b")

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(N,): tokens of each chat."""
        return np.frombuffer(self._lengths, np.int32)

    def write(self, batch: EncodedChats) -> None:
        """Append the chats of a batch.

        Raises:
            MachineError: the disk is full or failed.
        """
        with names_the_file(self._path):
            self._file.write(batch.words.tobytes())
        self._lengths.frombytes(batch.lengths.tobytes())

    def in_order(
        self, packs: Packs
    ) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.int32]]]:
        """Yield blocks of whole packs: their words, tokens of each chat, chats of each pack.

        Raises:
            MachineError: the spill cannot be read.
        """
        with names_the_file(self._path):
            self._file.flush()
        lengths = self.lengths
        begins = np.cumsum(lengths, dtype=np.int64) - lengths
        first_pack = first_chat = 0
        per_block = max(
            1, BLOCK_TOKENS // int(lengths.mean() * packs.chats.size / packs.sizes.size)
        )
        while first_pack < packs.sizes.size:
            sizes = packs.sizes[first_pack : first_pack + per_block]
            chats = packs.chats[first_chat : first_chat + int(sizes.sum())]
            here = lengths[chats]
            words = np.empty(int(here.sum()), np.uint32)
            self._fill(words, begins[chats], here)
            yield words, here, sizes
            first_pack, first_chat = first_pack + sizes.size, first_chat + chats.size

    def _fill(
        self, words: NDArray[np.uint32], begins: NDArray[np.int64], lengths: NDArray[np.int32]
    ) -> None:
        view = memoryview(words).cast("B")
        places = (np.cumsum(lengths, dtype=np.int64) - lengths) * 4
        by_place = np.argsort(begins)  # the disk is read forwards
        rows = zip(*(x[by_place].tolist() for x in (begins * 4, places, lengths * 4)), strict=True)
        with names_the_file(self._path):
            for begin, place, size in rows:
                done = 0
                while done < size:
                    part = view[place + done : place + size]
                    done += os.preadv(self._file.fileno(), [part], begin + done)

    def remove(self) -> None:
        """Close the file and remove it."""
        with suppress(OSError):  # closing flushes, which fails again where the disk is full
            self._file.close()
        remove([self._path])


class Rejects:
    """What was left out, with its reason, in a file beside the corpus; none where nothing was."""

    def __init__(self, path: Path, *, stop: bool) -> None:
        """Take the name of the file, and whether a record that is no chat stops the run."""
        self._path = path
        self._partial = Path(f"{path}.partial")
        self._stop = stop
        self._file: BinaryIO | None = None

    def write(self, refused: tuple[Refused, ...]) -> None:
        """Keep records aside.

        Raises:
            DataError: one is no chat, and such a one stops the run.
            MachineError: the disk is full or failed.
        """
        for row in refused:
            if self._stop and row.num_tokens is None:
                raise DataError(
                    f"{row.where}: {row.reason}. Mend or remove the record, or say --on-error skip."
                )
            with names_the_file(self._partial):
                if self._file is None:
                    self._file = self._partial.open("wb")
                line = {"where": row.where, "reason": row.reason, "record": row.record}
                self._file.write(json.dumps(line, default=str).encode() + b"\n")

    def publish(self) -> None:
        """Give the file its name."""
        with names_the_file(self._path):
            if self._file is None:
                self._path.unlink(missing_ok=True)
            else:
                flush_to_disk(self._file)
                self._file.close()
                self._partial.replace(self._path)

    def discard(self) -> None:
        """Remove what is not finished."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            remove([self._partial])


class PackWriter:
    """Writes the files of a corpus of packs."""

    def __init__(self, prefix: str, dtype: np.dtype[Any], *, overwrite: bool) -> None:
        """Begin the files.

        Raises:
            ConfigError, MachineError: as `IndexWriter`.
        """
        self._prefix = prefix
        self._loss = loss_path(prefix)
        self._loss_partial = Path(f"{self._loss}.partial")
        self._hash = hashlib.sha256()
        self._dtype = dtype
        self.trained_tokens = 0
        self._writer = IndexWriter(prefix, dtype, overwrite=overwrite, hashed=True)
        try:
            with names_the_file(self._loss_partial):
                self._file: BinaryIO = self._loss_partial.open("wb")
        except BaseException:
            self._writer.discard()
            raise

    def write(
        self,
        words: NDArray[np.uint32],
        lengths: NDArray[np.int32],
        sizes: NDArray[np.int32],
    ) -> None:
        """Append packs: (T,) words, (S,) tokens of each chat, (P,) chats of each pack.

        Raises:
            MachineError: the disk is full or failed.
        """
        targets = (words >= TARGET).view(np.uint8)
        tokens = (words & ~TARGET).astype(self._dtype)
        self._writer.write(DocumentBlock(tokens, lengths.astype(np.int64), sizes.astype(np.int64)))
        with names_the_file(self._loss_partial):
            self._file.write(targets.data)
        self._hash.update(targets.data)
        self.trained_tokens += int(np.count_nonzero(targets))

    def publish(self, record: Callable[[Mapping[str, FileRecord]], CorpusRecord]) -> None:
        """Give all files their names, and write the record that `record` makes of them.

        Raises:
            MachineError: the disk is full or failed.
        """
        self._writer.seal()
        with names_the_file(self._loss_partial):
            flush_to_disk(self._file)
            self._file.close()
            # What was there goes first: a record must not describe other files.
            meta_path(self._prefix).unlink(missing_ok=True)
            self._loss_partial.replace(self._loss)
        self._writer.publish()
        digests = self._writer.sha256 | {"loss.bin": self._hash.hexdigest()}
        files = {
            end: record_file(Path(f"{self._prefix}.{end}"), digest)
            for end, digest in digests.items()
        }
        write_record(self._prefix, record(files))

    def discard(self) -> None:
        """Remove what is not finished."""
        self._writer.discard()
        with suppress(OSError):
            self._file.close()
        remove([self._loss_partial])
