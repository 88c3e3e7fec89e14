"""Samples of a corpus of documents: runs of neighbouring tokens, read where they lie."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mlr1.data.index import bin_path, open_corpus
from megatron_mlr1.data.rows import Rows
from megatron_mlr1.data.sampler import Places
from megatron_mlr1.data.streams import TokenPart
from megatron_mlr1.errors import DataError
from megatron_mlr1.ops.document_rows import (
    SHORT,
    TOGETHER,
    TOKEN_TYPES,
    UNREADABLE,
    Outcome,
    document_rows,
)


class TokenSource:
    """The samples of one part of a corpus: where they lie in its file."""

    def __init__(self, part: TokenPart, seq_length: int, key: int) -> None:
        """Open the tokens of a part.

        Args:
            part: the part.
            seq_length: tokens of a sample, L.
            key: key of the stream, which draws where each epoch begins.

        Raises:
            DataError: the tokens cannot be opened.
        """
        self._part = part
        self._length = seq_length
        self.path = bin_path(part.prefix)
        self._file = _open(self.path)

        def origin(epoch: int) -> int:
            return int(part.origin(np.array([epoch]), np.array([0]), seq_length, key)[0])

        # A run reads one epoch of a corpus, or two where the one gives way to the next.
        self.origin = lru_cache(maxsize=4)(origin)
        """Where in the ring an epoch begins."""

    @property
    def num_items(self) -> int:
        """Samples in one epoch."""
        return self._part.num_items(self._length)

    @property
    def ring(self) -> tuple[int, int, int, int]:
        """Descriptor of the file, number of its type, first token and tokens of the part."""
        kind = TOKEN_TYPES.index(self._part.dtype)
        return self._file.fileno(), kind, self._part.first_token, self._part.num_tokens


class TokenReader:
    """The samples of all corpora of a run; a `Reader`."""

    def __init__(
        self, sources: Sequence[TokenSource], seq_length: int, *, end: int | None, num_ids: int
    ) -> None:
        """Take the corpora.

        Args:
            sources: one a stream.
            seq_length: tokens of a sample, L.
            end: the id that ends documents, where they are kept apart; None: they are not, and
                every token is trained on.
            num_ids: rows of the model's embedding.
        """
        self._sources = tuple(sources)
        self._rings = np.array([source.ring for source in sources], np.int64)
        self._length = seq_length
        self._end = TOGETHER if end is None else end
        self._num_ids = num_ids

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether the rows have bounds."""
        return self._end != TOGETHER

    def plan(self, places: Places) -> "TokenPlan":
        """Find where some neighbouring samples lie; see `Reader`."""
        number = len(self._sources)
        pairs, which = np.unique(places.epoch * number + places.stream, return_inverse=True)
        origins = [self._sources[pair % number].origin(pair // number) for pair in pairs.tolist()]
        begins = np.array(origins, np.int64)[which] + places.item * self._length
        rings = self._rings[places.stream]
        runs = np.column_stack((rings, begins % rings[:, 3]))
        return TokenPlan(self, torch.from_numpy(runs), places.stream)

    def fill(self, rows: Rows, plan: "TokenPlan", begin: int) -> None:
        """Read a micro-batch; see `Plan`.

        Raises:
            DataError: a file cannot be read or was cut short, or holds an id that the model has no
                row for.
        """
        bounds, longest = (
            (rows.bounds, rows.longest) if self.keeps_documents_apart else (None, None)
        )
        tensors = (rows.tokens, rows.labels, rows.loss_mask, rows.position_ids, bounds, longest)
        outcome = document_rows(plan.runs, begin, self._end, self._num_ids, tensors)
        if outcome is not None:
            stream = plan.streams[begin + outcome.row]
            raise self._error(self._sources[stream].path, outcome)

    def _error(self, path: Path, outcome: Outcome) -> DataError:
        if outcome.fault == UNREADABLE:
            return DataError(
                f"{path} cannot be read ({os.strerror(outcome.value)}). Mend the file system and "
                "start the same command again."
            )
        if outcome.fault == SHORT:
            return DataError(
                f"{path} ends before token {outcome.value}, which it had when this run started. "
                "Bring the file back and start the same command again."
            )
        return DataError(
            f"{path} holds the id {outcome.value}, and the model has rows for 0 to "
            f"{self._num_ids - 1}. The corpus was made with another tokenizer, or damaged: "
            "tools/check_data.py tells. Make it again with the run's."
        )


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """Where some neighbouring samples lie; a `Plan`."""

    reader: TokenReader
    runs: Tensor
    """int64 [count, 5], as `document_rows` takes them."""
    streams: NDArray[np.int32]
    """(count,)"""

    def fill(self, rows: Rows, begin: int) -> None:
        """Fill all rows; see `Plan`.

        Raises:
            DataError: as `TokenReader.fill`.
        """
        self.reader.fill(rows, self, begin)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened ({error.strerror}); training reads it. Bring it back, or "
            "leave the corpus out of the mixture."
        ) from error


def refuse_without_ends(prefix: str, end: int, *, appended: bool | None) -> None:
    """Refuse to keep documents apart where nothing in the corpus ends them.

    Args:
        prefix: the corpus.
        end: the id that ends documents.
        appended: what the record says; None: there is none, and the first documents are looked at.

    Raises:
        DataError: the documents have no ends.
    """
    if appended is None:
        appended = _first_documents_end_in(prefix, end)
    if not appended:
        raise DataError(
            f"{prefix}: its documents do not end in the tokenizer's end of document ({end}), and "
            "--document-mask finds them by it. Make the corpus again with --append-eod, or leave "
            "--document-mask out."
        )


LOOKED_AT = 8
"""Documents that tell whether a corpus without a record has ends."""


def _first_documents_end_in(prefix: str, end: int) -> bool:
    corpus = open_corpus(prefix)
    last = corpus.document_ends[1 : LOOKED_AT + 1]
    sequences = last[last > corpus.document_ends[:LOOKED_AT][: last.size]] - 1
    lengths = corpus.lengths[sequences]
    begins = corpus.begins[sequences] // corpus.tokens.dtype.itemsize
    places = (begins + lengths - 1)[lengths > 0]
    return bool((corpus.tokens[places] == end).all())
