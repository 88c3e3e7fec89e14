"""Samples of a corpus of packed chats: a pack is a row, and a chat sees nothing but itself.

A corpus of packs is a corpus whose documents are packs and whose sequences are the chats in them,
with `PREFIX.loss.bin` beside it: a byte for each token of `PREFIX.bin`, 1 where the token is a
target of training. Its record says the kind `packs`.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.disk import names_the_file
from megatron_mlr1.data.index import HEADER, bin_path, idx_path, open_corpus
from megatron_mlr1.data.pack_files import loss_path
from megatron_mlr1.data.provenance import read_record
from megatron_mlr1.data.rows import Row
from megatron_mlr1.errors import ConfigError, DataError


class PackSource:
    """The packs of a corpus; a `Source`. Reads by position alone, so threads may share it."""

    def __init__(self, prefix: str, sequence_length: int) -> None:
        """Open the files of a corpus of packs.

        Args:
            prefix: the corpus.
            sequence_length: tokens of a row, at least those of a pack; what is over is padding.

        Raises:
            ConfigError: the rows are shorter than the packs.
            DataError: a file is missing or broken, does not fit the others, or holds no packs.
        """
        record = read_record(prefix)
        if record is None or record.kind != "packs" or record.pack_length is None:
            raise DataError(
                f"{prefix}.meta.json does not say that these are packs. Make them again with "
                "tools/preprocess_chat.py."
            )
        if record.pack_length > sequence_length:
            raise ConfigError(
                f"{prefix} holds packs of {record.pack_length} tokens, and --seq-length is "
                f"{sequence_length}. Train with --seq-length {record.pack_length}, or pack again "
                f"with --pack-length {sequence_length}."
            )
        corpus = open_corpus(prefix)
        self._length = sequence_length
        self._num_sequences = corpus.lengths.size
        self._dtype = corpus.tokens.dtype
        self._bin, self._idx, self._loss = bin_path(prefix), idx_path(prefix), loss_path(prefix)
        with names_the_file(self._loss, DataError):
            size = self._loss.stat().st_size
        if size != corpus.num_tokens:
            raise DataError(
                f"{self._loss} has {size} bytes where {self._bin.name} has {corpus.num_tokens} "
                "tokens: one byte each. Pack the chats again with tools/preprocess_chat.py."
            )
        self._files = {path: _open(path) for path in (self._bin, self._idx, self._loss)}
        self._num_packs = corpus.num_documents

    @property
    def num_items(self) -> int:
        """Packs in one epoch, which is each of them once."""
        return self._num_packs

    @property
    def keeps_documents_apart(self) -> bool:
        """Always: chats in a pack have nothing to do with each other."""
        return True

    def read(self, epoch: int, item: int, row: Row) -> None:
        """Fill a row with pack `item`; see `Source`.

        The label of a token is the next one of its chat, and counts where that is a target. The
        last token of a chat has no label; padding is a document of its own, without labels.

        Raises:
            DataError: a file cannot be read or was cut short, or the pack is longer than the row.
        """
        lengths, first = self._chats(item)
        ends = np.cumsum(lengths, dtype=np.int64)
        count = int(ends[-1])
        if count > self._length or lengths.min() < 1:
            raise DataError(
                f"{self._idx}: pack {item} has {count} tokens in {lengths.size} chats, and a row "
                f"has {self._length}. Pack the chats again with tools/preprocess_chat.py."
            )
        tokens = self._read(self._bin, self._dtype, count, first * self._dtype.itemsize)
        targets = self._read(self._loss, np.dtype(np.uint8), count, first)
        row.tokens[:count] = tokens
        row.tokens[count:] = tokens[-1]
        row.labels[: count - 1] = tokens[1:]
        row.labels[count - 1 :] = tokens[-1]
        row.loss_mask[: count - 1] = targets[1:]
        row.loss_mask[count - 1 :] = 0
        row.loss_mask[ends - 1] = 0
        row.keep_apart(ends if count == self._length else np.append(ends, self._length))

    def _chats(self, item: int) -> tuple[NDArray[np.int32], int]:
        """Read the tokens of each chat of a pack, and the token that the pack begins with."""
        size = self._num_sequences
        at = HEADER.size + 12 * size + 8 * item
        first, last = self._read(self._idx, np.dtype("<i8"), 2, at).tolist()
        if not 0 <= first < last <= size:
            raise DataError(
                f"{self._idx}: pack {item} has the chats {first} to {last} of {size}. Pack the "
                "chats again with tools/preprocess_chat.py."
            )
        at = HEADER.size + 4 * first
        lengths = self._read(self._idx, np.dtype("<i4"), last - first, at)
        at = HEADER.size + 4 * size + 8 * first
        begin = int(self._read(self._idx, np.dtype("<i8"), 1, at)[0])
        return lengths, begin // self._dtype.itemsize

    def _read(self, path: Path, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
        numbers = np.empty(count, dtype)
        left = memoryview(numbers).cast("B")
        while left:
            with names_the_file(path, DataError):
                num_bytes = os.preadv(self._files[path].fileno(), [left], offset)
            if num_bytes == 0:
                raise DataError(
                    f"{path} ends at byte {offset}, and had more when this run started. Bring the "
                    "file back and start the same command again."
                )
            left, offset = left[num_bytes:], offset + num_bytes
        return numbers


def _open(path: Path) -> BinaryIO:
    with names_the_file(path, DataError):
        return path.open("rb", buffering=0)
