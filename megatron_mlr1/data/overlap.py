"""N-grams of benchmarks that are in a corpus: what to know before its figures are believed.

Documents are compared as tokens, so all corpora must be made with one tokenizer. An n-gram lies
within one document. A document of fewer than n tokens is one gram, all of it, and is found only
where a document of the corpus has exactly these tokens. An end-of-document token that closes a
document is no part of it where its id is given.

Memory is proportional to the benchmarks. The corpus is streamed: a hash of every n tokens, a look
into a small table, and for the few that pass a comparison of the tokens themselves, so nothing is
found that is not there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.index import MAX_SEQUENCE_TOKENS, Corpus, bin_path
from megatron_mlr1.data.statistics import document_spans
from megatron_mlr1.errors import ConfigError, DataError, MachineError

BLOCK_TOKENS = 1 << 18
MULTIPLIER = 0xD6E8FEB86659FD93
"""Odd, so that no token is lost in the product; else any 64 bits without a pattern."""
BYTES_A_GRAM = 16
"""Size of the table for the first look; of hashes that it need not pass one in 16 does."""

type Tokens = NDArray[Any]
type Hashes = NDArray[np.uint64]
type Places = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ContaminatedDocument:
    """A document of the corpus that shares grams with the benchmarks."""

    document: int
    num_tokens: int
    num_found: int
    """How many of its grams, counted at each place, are in the benchmarks."""
    place: int
    """Where the first of them begins in the document, in tokens."""
    gram: Tokens
    """The tokens of this first one."""
    against: int
    """The benchmark that has it, by its place in the list."""
    against_document: int
    """The first document there that has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """What of the benchmarks is in a corpus, for the A documents of all benchmarks in order."""

    benchmark: NDArray[np.int64]
    """(A,): which benchmark each is of."""
    document: Places
    """(A,): its number there."""
    num_grams: Places
    """(A,): how many grams it has, counted at each place; 0 for an empty one."""
    num_found: Places
    """(A,): how many of these the corpus has."""
    first_document: Places
    """(A,): the first document of the corpus that has one of them, -1 where there is none."""
    num_documents: int
    """Documents of the corpus that share a gram."""
    num_places: int
    """Places of the corpus where a gram of the benchmarks begins."""
    largest_token: int
    """Of the corpus."""


class Grams:
    """The grams of some benchmarks, to be looked for in corpora."""

    def __init__(self, benchmarks: Sequence[Corpus], n: int, eod: int | None) -> None:
        """Read the benchmarks; about 100 bytes a token.

        Raises:
            ConfigError: `n` is less than 1, or more than a document can have.
            DataError: an index contradicts itself, or there is no gram at all.
        """
        if not 1 <= n <= MAX_SEQUENCE_TOKENS:
            raise ConfigError(
                f"--ngram is {n}; it counts tokens, so 1 to {MAX_SEQUENCE_TOKENS}. 13 is usual."
            )
        self.n, self.eod = n, eod
        spans = [_all_borders(corpus) for corpus in benchmarks]
        self.benchmark = np.repeat(np.arange(len(spans)), [borders.size - 1 for borders in spans])
        self.document = np.concatenate([np.arange(borders.size - 1) for borders in spans])
        tokens = np.concatenate([corpus.tokens for corpus in benchmarks])
        shifts = np.cumsum([0, *(corpus.num_tokens for corpus in benchmarks)])
        starts = np.concatenate(
            [b[:-1] + shift for b, shift in zip(spans, shifts[:-1], strict=True)]
        )
        ends = np.concatenate([b[1:] + shift for b, shift in zip(spans, shifts[:-1], strict=True)])
        ends = _without_eod(tokens, starts, ends, eod)
        lengths = ends - starts
        self.num_grams = np.where(lengths < n, np.minimum(lengths, 1), lengths - n + 1)
        self.largest_token = int(tokens.max(initial=0))
        self.tables = {}
        for length in np.unique(np.minimum(lengths[lengths > 0], n)).tolist():
            # All documents of fewer than n tokens have a table of their length.
            mine = np.flatnonzero(lengths >= n if length == n else lengths == length)
            counts = self.num_grams[mine]
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            places = np.repeat(starts[mine], counts) + within
            self.tables[length] = _Table(tokens, length, places, np.repeat(mine, counts))
        if not self.tables:
            names = ", ".join(corpus.prefix for corpus in benchmarks)
            raise DataError(f"{names}: no document has a token. Name corpora with documents.")


def find_overlap(
    corpus: Corpus,
    grams: Grams,
    on_document: Callable[[ContaminatedDocument], None],
    on_progress: Callable[[int], object],
) -> Overlap:
    """Look for the grams in all documents of a corpus.

    Each document that shares one is given to `on_document`, in order, the tokens of each block that
    is done to `on_progress`.

    Raises:
        DataError: the index contradicts itself.
        MachineError: the tokens cannot be read.
    """
    first = {length: np.full(table.num_grams, -1) for length, table in grams.tables.items()}
    last: ContaminatedDocument | None = None
    num_documents = num_places = largest_token = 0
    for block in _blocks(corpus, grams):
        largest_token = max(largest_token, int(block.tokens.max()))
        hits = _look(block, grams, first)
        for found in _documents(block, hits, grams):
            num_places += found.num_found
            if last is not None and last.document == found.document:
                last = replace(last, num_found=last.num_found + found.num_found)
                continue
            num_documents += 1
            if last is not None:
                on_document(last)
            last = found
        on_progress(block.num_starts)
    if last is not None:
        on_document(last)
    num_found, first_document = _of_benchmarks(grams, first)
    return Overlap(
        benchmark=grams.benchmark,
        document=grams.document,
        num_grams=grams.num_grams,
        num_found=num_found,
        first_document=first_document,
        num_documents=num_documents,
        num_places=num_places,
        largest_token=largest_token,
    )


def window_hashes(tokens: Tokens, length: int) -> Hashes:
    """Hash every `length` neighbours of (T,) tokens to (T - length + 1,) numbers.

    The polynomial sum of `MULTIPLIER`^(length - j) * token j, j from 0, modulo 2^64, put together
    from hashes of 1, 2, 4, ... tokens.
    """
    power = tokens.astype(np.uint64) * np.uint64(MULTIPLIER)
    result = np.zeros(tokens.size + 1, np.uint64)
    covered, width = 0, 1
    while True:
        factor = np.uint64(pow(MULTIPLIER, width, 1 << 64))
        if length & width:
            size = max(tokens.size - covered - width + 1, 0)
            result = result[:size] * factor + power[covered : covered + size]
            covered += width
        if covered == length:
            return result
        size = max(power.size - width, 0)
        power = power[:size] * factor + power[width : width + size]
        width *= 2


def hashes_at(tokens: Tokens, places: Places, length: int) -> Hashes:
    """Hash the `length` tokens from each of the places: the definition of `window_hashes`."""
    result = np.zeros(places.size, np.uint64)
    for j in range(length):
        result = (result + tokens[places + j].astype(np.uint64)) * np.uint64(MULTIPLIER)
    return result


class _Table:
    """The different grams of one length; W places of the benchmarks in all."""

    def __init__(self, tokens: Tokens, length: int, places: Places, documents: Places) -> None:
        self.length, self._tokens, self._documents = length, tokens, documents
        hashes = hashes_at(tokens, places, length)
        order = np.argsort(hashes, kind="stable")
        is_new = np.ones(order.size, np.bool_)
        is_new[1:] = hashes[order[1:]] != hashes[order[:-1]]
        again = np.flatnonzero(~is_new)
        is_new[again] = ~_same(
            tokens, places[order[again]], tokens, places[order[again - 1]], length
        )
        kept = order[is_new]
        self._hashes, self._places, self._first = hashes[kept], places[kept], documents[kept]
        self.num_grams = kept.size
        self._shift = np.uint64(64 - max((self.num_grams * BYTES_A_GRAM).bit_length(), 10))
        self._passes = np.zeros(1 << (64 - int(self._shift)), np.bool_)
        self._passes[self._hashes >> self._shift] = True
        # By the same look-up as later, so that equal grams get equal numbers in any case.
        self._grams = self.find(tokens, places, hashes)

    def may_hold(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Tell of each hash whether a gram may have it: fast, and seldom wrong."""
        return np.take(self._passes, hashes >> self._shift)

    def find(self, tokens: Tokens, places: Places, hashes: Hashes) -> Places:
        """Give the number of the gram at each of the places of `tokens`, -1 where there is none."""
        at = np.searchsorted(self._hashes, hashes)
        found = np.full(places.size, -1)
        open_ = np.arange(places.size)
        while open_.size:  # again only where different grams have the same hash
            open_ = open_[at[open_] < self.num_grams]
            open_ = open_[self._hashes[at[open_]] == hashes[open_]]
            mine = self._places[at[open_]]
            same = _same(tokens, places[open_], self._tokens, mine, self.length)
            found[open_[same]] = at[open_[same]]
            open_ = open_[~same]
            at[open_] += 1
        return found

    def first_document(self, gram: int) -> int:
        """Name the first document of the benchmarks, counted through all, that has the gram."""
        return int(self._first[gram])

    def of_benchmarks(self, first: Places) -> tuple[Places, Places]:
        """Of (grams,) first documents give (W,) documents of the benchmarks and their (W,)."""
        return self._documents, first[self._grams]


@dataclass(frozen=True, slots=True)
class _Block:
    """Tokens of a corpus, and those of its documents that may have grams among them."""

    tokens: Tokens
    num_starts: int
    """Grams begin at the first so many tokens; those after them let these end."""
    documents: Places
    starts: Places
    """Where each document starts among the tokens; negative where it started before."""
    ends: Places
    """Where each ends, likewise, without its closing token where that is ignored."""
    lengths: Places


@dataclass(frozen=True, slots=True)
class _Hits:
    """Places of a block where grams begin, in their order."""

    places: Places
    owners: Places
    """The document of each, counted in the block."""
    lengths: Places
    """Tokens of each gram."""
    grams: Places


def _all_borders(corpus: Corpus) -> Places:
    spans = list(document_spans(corpus))
    return np.concatenate([spans[0].borders[:1], *(span.borders[1:] for span in spans)])


def _without_eod(tokens: Tokens, starts: Places, ends: Places, eod: int | None) -> Places:
    """Take the closing token off documents that end among `tokens`."""
    if eod is None:
        return ends
    known = np.flatnonzero((ends > np.maximum(starts, 0)) & (ends <= tokens.size))
    shorter = ends.copy()
    shorter[known] -= tokens[ends[known] - 1] == eod
    return shorter


def _same(tokens: Tokens, places: Places, others: Tokens, at: Places, length: int) -> Any:
    same = np.ones(places.size, np.bool_)
    for j in range(length):
        same &= tokens[places + j] == others[at + j]
    return same


def _blocks(corpus: Corpus, grams: Grams) -> Iterator[_Block]:
    path, dtype = bin_path(corpus.prefix), corpus.tokens.dtype
    for span in document_spans(corpus):
        full = np.flatnonzero(span.borders[1:] > span.borders[:-1])
        starts, ends = span.borders[:-1][full], span.borders[1:][full]
        stop = int(span.borders[-1])
        for begin in range(int(span.borders[0]), stop, BLOCK_TOKENS):
            num_starts = min(BLOCK_TOKENS, stop - begin)
            size = min(num_starts + grams.n - 1, stop - begin)
            try:
                # Read, not mapped: what was mapped would count as this program's memory.
                tokens = np.fromfile(path, dtype, size, offset=begin * dtype.itemsize)
            except OSError as error:
                raise MachineError(
                    f"{path}: {error.strerror}. Mend the disk; run again."
                ) from error
            low = int(np.searchsorted(ends, begin, "right"))
            high = int(np.searchsorted(starts, begin + num_starts))
            here = starts[low:high] - begin
            until = _without_eod(tokens, here, ends[low:high] - begin, grams.eod)
            yield _Block(
                tokens=tokens,
                num_starts=num_starts,
                documents=span.first + full[low:high],
                starts=here,
                ends=until,
                lengths=ends[low:high] - starts[low:high],
            )


def _look(block: _Block, grams: Grams, first: dict[int, Places]) -> _Hits:
    """Find the grams of a block, and note in `first` those that were not met before."""
    parts = []
    for length, table in grams.tables.items():
        if length == grams.n:
            hashes = window_hashes(block.tokens, length)
            places = np.flatnonzero(table.may_hold(hashes))
            hashes = hashes[places]
            owners = np.searchsorted(block.starts, places, "right") - 1
            inside = places + length <= block.ends[owners]
            places, hashes, owners = places[inside], hashes[inside], owners[inside]
        else:
            whole = (block.starts >= 0) & (block.ends - block.starts == length)
            owners = np.flatnonzero(whole)
            places = block.starts[owners]
            hashes = hashes_at(block.tokens, places, length)
        numbers = table.find(block.tokens, places, hashes)
        is_there = numbers >= 0
        places, owners, numbers = places[is_there], owners[is_there], numbers[is_there]
        is_new = first[length][numbers] < 0
        # Of equal indices the last assignment stays, so the earliest document comes last.
        first[length][numbers[is_new][::-1]] = block.documents[owners[is_new]][::-1]
        parts.append(_Hits(places, owners, np.full(places.size, length), numbers))
    order = np.argsort(np.concatenate([part.places for part in parts]))
    return _Hits(
        places=np.concatenate([part.places for part in parts])[order],
        owners=np.concatenate([part.owners for part in parts])[order],
        lengths=np.concatenate([part.lengths for part in parts])[order],
        grams=np.concatenate([part.grams for part in parts])[order],
    )


def _documents(block: _Block, hits: _Hits, grams: Grams) -> Iterator[ContaminatedDocument]:
    borders = np.flatnonzero(np.diff(hits.owners, prepend=-1, append=-1)).tolist()
    for at, end in pairwise(borders):
        owner, place, length = (int(x[at]) for x in (hits.owners, hits.places, hits.lengths))
        source = grams.tables[length].first_document(int(hits.grams[at]))
        yield ContaminatedDocument(
            document=int(block.documents[owner]),
            num_tokens=int(block.lengths[owner]),
            num_found=end - at,
            place=place - int(block.starts[owner]),
            gram=block.tokens[place : place + length],
            against=int(grams.benchmark[source]),
            against_document=int(grams.document[source]),
        )


def _of_benchmarks(grams: Grams, first: dict[int, Places]) -> tuple[Places, Places]:
    num_found = np.zeros(grams.document.size, np.int64)
    nowhere = np.iinfo(np.int64).max
    first_document = np.full(grams.document.size, nowhere)
    for length, table in grams.tables.items():
        documents, met = table.of_benchmarks(first[length])
        documents, met = documents[met >= 0], met[met >= 0]
        num_found += np.bincount(documents, minlength=num_found.size)
        np.minimum.at(first_document, documents, met)
    first_document[first_document == nowhere] = -1
    return num_found, first_document
