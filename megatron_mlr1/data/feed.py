"""All samples of a run: the order that numbers them, and the corpora that they are read from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mlr1.data.mixture import Blend
from megatron_mlr1.data.packs import PackSource
from megatron_mlr1.data.provenance import CorpusRecord, read_record
from megatron_mlr1.data.rows import Plan, Reader, Row, Rows, Source
from megatron_mlr1.data.sampler import Phase, Places, SampleOrder, Stream
from megatron_mlr1.data.splits import Share
from megatron_mlr1.data.streams import part_of, stream_key
from megatron_mlr1.data.token_source import TokenReader, TokenSource, refuse_without_ends
from megatron_mlr1.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How samples are made of tokens, the same for all corpora of a run."""

    seq_length: int
    """Tokens of a sample, L."""

    seed: int
    """Of the order."""

    end: int | None
    """The id that ends documents, where they are kept apart; else None."""

    num_ids: int
    """Rows of the model's embedding."""


BLOCK = 4096
"""Samples that are looked up at once: a call costs as much as some hundred samples."""

NEAR = BLOCK // 16
"""Samples between two micro-batches of a reader, at most, for a block to be worth it."""


class Feed:
    """Fills rows with samples by their number; a pure function of files, seed and number."""

    def __init__(self, order: SampleOrder, reader: Reader) -> None:
        """Take an order, and what reads its streams."""
        self._order = order
        self._reader = reader
        self.keeps_documents_apart = reader.keeps_documents_apart
        # What was planned last, as long as it serves; it changes no sample.
        self._planned = range(0)
        self._plan: Plan = reader.plan(order.places(0, 0))
        self._last = 0

    def fill(self, rows: Rows, first: int) -> None:
        """Fill all rows of a micro-batch with neighbouring samples; for one thread at a time.

        Args:
            rows: B rows.
            first: number of the first of B samples.

        Raises:
            DataError: a corpus cannot be read, or holds an id that the model has no row for.
        """
        end, planned = first + rows.batch, self._planned
        if not planned.start <= first < end <= planned.stop:
            is_near = 0 < first - self._last <= NEAR
            planned = range(first, max(end, first + BLOCK) if is_near else end)
            self._plan = self._reader.plan(self._order.places(first, len(planned)))
            self._planned = planned
        self._last = first
        self._plan.fill(rows, first - planned.start)

    def samples(self, consumed: int) -> dict[str, int]:
        """Count the first `consumed` samples by corpus, in the order of the mixture."""
        totals: dict[str, int] = {}
        counts = self._order.counts(consumed).tolist()
        for stream, count in zip(self._order.streams, counts, strict=True):
            totals[stream.name] = totals.get(stream.name, 0) + count
        return totals


def open_feed(blends: Sequence[Blend], share: Share, reading: Reading) -> Feed:
    """Open one part of every corpus of the blends, and put their samples in order.

    The cost depends neither on documents nor on samples.

    Args:
        blends: by rising first sample, the first from sample 0 on.
        share: where the part begins and ends in each corpus, 0 to 1.
        reading: how samples are made.

    Raises:
        DataError: a corpus that is broken or has too few tokens, documents without an end where
            they are kept apart, or documents and packs in one run.
    """
    corpora = {corpus.prefix: corpus for blend in blends for corpus in blend.corpora}
    records = {prefix: read_record(str(prefix)) for prefix in corpora}
    refuse_documents_beside_packs(records)
    weights = [{corpus.prefix: corpus.weight for corpus in blend.corpora} for blend in blends]
    keys = {prefix: f"{corpus.name}/{prefix.name}" for prefix, corpus in corpora.items()}
    reader: Reader
    if any(map(are_packs, records.values())):
        packs = [_packs(prefix, share, reading) for prefix in corpora]
        sizes, reader = [it.num_items for it in packs], RowReader(packs)
    else:
        parts = [_tokens(prefix, records[prefix], share, reading, keys[prefix]) for prefix in keys]
        sizes = [it.num_items for it in parts]
        reader = TokenReader(parts, reading.seq_length, end=reading.end, num_ids=reading.num_ids)
    streams = [
        Stream(
            name=corpus.name,
            key=keys[prefix],
            weight=weights[0].get(prefix, 0.0),
            num_items=size,
        )
        for (prefix, corpus), size in zip(corpora.items(), sizes, strict=True)
    ]
    phases = [
        Phase(
            first_sample=blend.first_sample,
            weights=tuple(weight.get(prefix, 0.0) for prefix in corpora),
        )
        for blend, weight in zip(blends[1:], weights[1:], strict=True)
    ]
    return Feed(SampleOrder(streams, reading.seed, phases), reader)


def refuse_documents_beside_packs(records: Mapping[Path, CorpusRecord | None]) -> None:
    """Refuse corpora of documents and of packs in one run.

    Raises:
        DataError: names one of each.
    """
    packs = [prefix for prefix, record in records.items() if are_packs(record)]
    documents = [prefix for prefix in records if prefix not in packs]
    if packs and documents:
        raise DataError(
            f"{packs[0]} holds packed chats and {documents[0]} documents; a run reads one kind. "
            "Pack the documents' records too (tools/preprocess_chat.py), or leave one kind out."
        )


def are_packs(record: CorpusRecord | None) -> bool:
    """Tell whether a corpus holds packs, whose documents are always kept apart."""
    return record is not None and record.kind == "packs"


def _tokens(
    prefix: Path, record: CorpusRecord | None, share: Share, reading: Reading, key: str
) -> TokenSource:
    if reading.end is not None:
        appended = None if record is None else record.append_eod
        refuse_without_ends(str(prefix), reading.end, appended=appended)
    part = part_of(str(prefix), *share)
    return TokenSource(part, reading.seq_length, stream_key(reading.seed, key))


def _packs(prefix: Path, share: Share, reading: Reading) -> Source:
    return _ShareOf(PackSource(str(prefix), reading.seq_length), share)


class RowReader:
    """Sources that fill row by row; a `Reader`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Take the source of each stream."""
        self._sources = tuple(sources)
        self.keeps_documents_apart = all(source.keeps_documents_apart for source in sources)

    def plan(self, places: Places) -> "RowPlan":
        """Keep the places; see `Reader`."""
        numbers = (places.stream.tolist(), places.epoch.tolist(), places.item.tolist())
        return RowPlan(self._sources, tuple(zip(*numbers, strict=True)))


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Places of some neighbouring samples; a `Plan`."""

    sources: tuple[Source, ...]
    places: tuple[tuple[int, int, int], ...]
    """Stream, epoch and item of each."""

    def fill(self, rows: Rows, begin: int) -> None:
        """Fill one row after the other; see `Plan`.

        Raises:
            DataError: a corpus cannot be read.
        """
        for row, (stream, epoch, item) in zip(rows.each, self.places[begin:], strict=False):
            self.sources[stream].read(epoch, item, row)


class _ShareOf:
    """Some neighbouring items of a source."""

    def __init__(self, source: Source, share: Share) -> None:
        self._source = source
        self._first, last = (round(border * source.num_items) for border in share)
        self.num_items = last - self._first
        self.keeps_documents_apart = source.keeps_documents_apart

    def read(self, epoch: int, item: int, row: Row) -> None:
        """Fill a row; see `Source`."""
        self._source.read(epoch, self._first + item, row)
