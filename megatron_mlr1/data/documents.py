"""Ids of texts to blocks of documents: what stands before, behind and at the end, in whole arrays.

One rule, that of Megatron-LM's `tools/preprocess_data.py`: a text without ids makes no sequence,
and a document without sequences gets no end-of-document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.index import DocumentBlock


@dataclass(frozen=True, slots=True)
class Ids:
    """Ids of N texts."""

    flat: NDArray[Any]
    """(T,): ids of all texts, one after another; of any integer type."""
    lengths: NDArray[np.int64]
    """(N,): ids of each text; they sum to T."""

    def part(self, begin: int, end: int) -> "Ids":
        """Take the texts from `begin` to `end`."""
        first, last = int(self.lengths[:begin].sum()), int(self.lengths[:end].sum())
        return Ids(self.flat[first:last], self.lengths[begin:end])


def ids_of_lists(lists: Sequence[Sequence[int]], num_texts: int) -> Ids:
    """Lay the ids of each of `num_texts` texts one after another."""
    assert len(lists) == num_texts, "a tokenizer must answer every text"
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return Ids(np.fromiter(chain.from_iterable(lists), np.int64, int(lengths.sum())), lengths)


def join(parts: Sequence[Ids]) -> Ids:
    """Lay the ids of several stretches of texts, at least one, one after another."""
    return Ids(
        np.concatenate([part.flat for part in parts]),
        np.concatenate([part.lengths for part in parts]),
    )


@dataclass(frozen=True, slots=True)
class Frame:
    """Ids that are put around the ids of a text."""

    before: tuple[int, ...] = ()
    """Before each text, such as its beginning."""
    after: tuple[int, ...] = ()
    """Behind each text."""
    eod: int | None = None
    """At the end of each document that has tokens; None: nothing."""


def lay_out(
    ids: Ids, counts: NDArray[np.int64] | None, frame: Frame, dtype: np.dtype[Any]
) -> DocumentBlock:
    """Make a block of documents.

    Args:
        ids: of N texts; each fits into `dtype`.
        counts: (D,): texts of each document, summing to N; None: each text is a document.
        frame: what to put around them.
        dtype: of the tokens.
    """
    num_framing = len(frame.before) + len(frame.after)
    lengths = ids.lengths + num_framing
    sequences = _count_sequences(lengths > 0, counts)
    kept = lengths[lengths > 0]
    num_eod = np.zeros_like(kept)
    if frame.eod is not None:
        num_eod[np.cumsum(sequences)[sequences > 0] - 1] = 1
    return DocumentBlock(_tokens(ids.flat, kept, num_eod, frame, dtype), kept + num_eod, sequences)


def _count_sequences(
    is_kept: NDArray[np.bool_], counts: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    if counts is None:
        return is_kept.astype(np.int64)
    ends = np.cumsum(counts)
    kept_before = np.zeros(is_kept.size + 1, np.int64)
    np.cumsum(is_kept, out=kept_before[1:])
    sequences: NDArray[np.int64] = kept_before[ends] - kept_before[ends - counts]
    return sequences


def _tokens(
    flat: NDArray[Any],
    lengths: NDArray[np.int64],
    num_eod: NDArray[np.int64],
    frame: Frame,
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    if not (frame.before or frame.after or num_eod.any()) or not lengths.size:
        return flat.astype(dtype)
    ends = np.cumsum(lengths + num_eod)
    begins = ends - lengths - num_eod
    tokens = np.empty(int(ends[-1]), dtype)
    is_text = np.ones(tokens.size, np.bool_)
    for index, token in enumerate(frame.before):
        place = begins + index
        tokens[place], is_text[place] = token, False
    for index, token in enumerate(reversed(frame.after), 1):
        place = ends - num_eod - index
        tokens[place], is_text[place] = token, False
    if frame.eod is not None:
        place = ends[num_eod > 0] - 1
        tokens[place], is_text[place] = frame.eod, False
    tokens[is_text] = flat
    return tokens
