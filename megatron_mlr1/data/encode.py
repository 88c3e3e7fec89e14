"""Units of input to blocks of tokens, in the order of the input, in constant memory.

Four things go on at the same time: a thread reads and parses, another one (or processes) makes
ids, a third lays documents out, and whoever asks for the batches writes them.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mlr1.data.agreement import Answer, encode_fast, encode_here, encode_in_processes
from megatron_mlr1.data.documents import Frame, Ids, lay_out
from megatron_mlr1.data.index import DocumentBlock, token_dtype
from megatron_mlr1.data.inputs import Unit, missing_package
from megatron_mlr1.data.pipeline import run_ahead
from megatron_mlr1.data.records import read_lines
from megatron_mlr1.data.texts import BLOCK_BYTES, Rejected, TextBatch, Texts
from megatron_mlr1.data.tokenizer_identity import TokenizerIdentity, identify
from megatron_mlr1.data.tokenizers import ByteTokenizer, TokenizerPlan
from megatron_mlr1.errors import ConfigError, DataError

__all__ = [
    "EncodePlan",
    "EncodedBatch",
    "Position",
    "Rejected",
    "describe_tokenizer",
    "encode_units",
]


@dataclass(frozen=True, slots=True)
class Position:
    """A border between records, from which reading can go on. `Position(**asdict(p)) == p`."""

    unit: int
    """Index into the units."""
    offset: int
    """Of the unit: bytes of (decompressed) text, or rows, before this border."""


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Neighbouring records of one unit, encoded."""

    blocks: Mapping[str, DocumentBlock]
    """One for each key, all with the same documents; tokens have the dtype of the corpus."""
    rejected: tuple[Rejected, ...]
    num_records: int
    """Records read: documents and rejected ones."""
    stored_bytes: int
    """What reading them took from the files as they are stored. Sums to about the units' bytes."""
    end: Position
    """The run may go on from here."""
    engine: str
    """The library that made the ids, with its version, such as `gigatoken 0.10.0`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodePlan:
    """How records become tokens."""

    tokenizer: TokenizerPlan
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    """End each document that has tokens with the tokenizer's id for that."""
    vocab_size: int | None = None
    """Ids must be smaller; None: the tokenizer's own number of ids."""
    workers: int = 1
    """Threads of the fast tokenizer, or processes of any other."""
    skip_bad: bool = False
    """Hand over bad records as `Rejected`; otherwise the first one raises."""
    check_documents: int = 256
    """Documents on which the fast tokenizer must agree with `tokenizers` before it is used."""
    few_characters: int = 2**18
    """Where fewer are left to encode, one process does it with the true tokenizer: loading the fast
    one, or starting others, takes longer."""


def encode_units(
    plan: EncodePlan, units: Sequence[Unit], start: Position | None = None
) -> Generator[EncodedBatch]:
    """Encode all records from `start` on. Closing the generator ends its threads and processes.

    Raises:
        ConfigError: at once: `append_eod` without such an id, or an id outside the vocabulary.
        DataError: at once: the tokenizer cannot be loaded; later: a bad record (not `skip_bad`), a
            damaged file, an id outside the vocabulary.
        MachineError: a worker died, or a package is missing.
    """
    identity = _identity(plan.tokenizer)
    limit = identity.vocab_size if plan.vocab_size is None else plan.vocab_size
    eod = _eod(plan, identity, limit)
    documents = _Documents(token_dtype(identity.vocab_size), limit, eod)
    return _encode(plan, identity, documents, units, start or Position(0, 0))


def describe_tokenizer(plan: TokenizerPlan) -> dict[str, Any]:
    """Describe what decides the ids; JSON-able.

    Returns:
        `type`, `model`, `sha256` (of what decides the ids), `vocab_size`, `eod`, `bos` (both None
        where there is none), and `dtype` (of a token in the corpus, as NumPy names it). Which
        library made the ids stands in each `EncodedBatch`; it does not decide them.

    Raises:
        ConfigError: the type is unknown, or its model is not named.
        DataError: its files are missing or damaged.
    """
    identity = _identity(plan)
    return {
        "type": plan.tokenizer_type,
        "model": plan.tokenizer_model,
        "sha256": identity.sha256,
        "vocab_size": identity.vocab_size,
        "eod": identity.eod,
        "bos": identity.bos,
        "dtype": token_dtype(identity.vocab_size).name,
    }


def _identity(plan: TokenizerPlan) -> TokenizerIdentity:
    model = Path(plan.tokenizer_model or "")
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    stats = [path.stat() for path in files if path.is_file()]
    return _identify_once(plan, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache(maxsize=1)
def _identify_once(plan: TokenizerPlan, stamps: tuple[tuple[int, int], ...]) -> TokenizerIdentity:
    """Read a large vocabulary once for all corpora of a run, as long as its files stay the same."""
    return identify(plan)


def _eod(plan: EncodePlan, identity: TokenizerIdentity, limit: int) -> int | None:
    if not plan.append_eod:
        return None
    if identity.eod is None:
        raise ConfigError(
            "--append-eod needs a tokenizer with an end-of-sequence token; this one has none. "
            "Add one to its configuration, or leave --append-eod out."
        )
    if identity.eod >= limit:
        raise ConfigError(
            f"--append-eod would write id {identity.eod}, outside the vocabulary of {limit} ids. "
            "Mend --vocab-size or the tokenizer."
        )
    return identity.eod


def _encode(
    plan: EncodePlan,
    identity: TokenizerIdentity,
    documents: "_Documents",
    units: Sequence[Unit],
    start: Position,
) -> Generator[EncodedBatch]:
    with closing(run_ahead(_read(plan, units, start))) as texts:
        answers = run_ahead(_answers(plan, identity, texts))
        with closing(run_ahead(_lay_out(answers, documents))) as batches:
            yield from batches


def _read(plan: EncodePlan, units: Sequence[Unit], start: Position) -> Generator[TextBatch]:
    for number, unit in enumerate(units):
        if number < start.unit:
            continue
        skip = start.offset if number == start.unit else 0
        for batch in _records(unit, plan.json_keys, skip):
            if batch.rejected and not plan.skip_bad:
                raise next(iter(batch.rejected.values())).as_error()
            yield replace(batch, unit=number)


def _records(unit: Unit, keys: Sequence[str], skip: int) -> Iterator[TextBatch]:
    if unit.kind == "jsonl":
        return read_lines(unit, keys, skip, BLOCK_BYTES)
    try:
        from megatron_mlr1.data.columns import read_arrow, read_hub, read_parquet
    except ImportError as error:
        raise missing_package(error, unit.path) from error
    readers = {"parquet": read_parquet, "arrow": read_arrow, "hub": read_hub}
    return readers[unit.kind](unit, keys, skip, BLOCK_BYTES)


def _answers(
    plan: EncodePlan, identity: TokenizerIdentity, batches: Iterator[TextBatch]
) -> Generator[Answer]:
    if not identity.library:
        tokenizer = ByteTokenizer(identity.vocab_size)
        for batch in batches:
            ids = tokenizer.encode_flat(batch.all_texts())
            yield Answer(batch, ids, Frame(), identity.engine)
        return
    first, is_all = _read_few(batches, plan.few_characters)
    batches = chain(first, batches)
    if is_all:
        yield from encode_here(batches, plan.tokenizer, identity)
    elif identity.definition is not None:
        yield from encode_fast(
            batches, plan.tokenizer, identity, plan.workers, plan.check_documents
        )
    else:
        yield from encode_in_processes(batches, plan.tokenizer, identity, plan.workers)


def _read_few(
    batches: Iterator[TextBatch], few_characters: int
) -> tuple[Sequence[TextBatch], bool]:
    """Read up to so many characters, and tell whether that was all."""
    first: list[TextBatch] = []
    while few_characters > 0:
        batch = next(batches, None)
        if batch is None:
            return first, True
        first.append(batch)
        few_characters -= sum(map(len, batch.all_texts()))
    return first, False


def _lay_out(answers: Generator[Answer], documents: "_Documents") -> Generator[EncodedBatch]:
    with closing(answers):
        for answer in answers:
            batch = answer.batch
            yield EncodedBatch(
                documents.blocks(answer),
                tuple(batch.rejected.values()),
                batch.num_records,
                batch.stored_bytes,
                Position(batch.unit, batch.offset),
                answer.engine,
            )


@dataclass(frozen=True, slots=True)
class _Documents:
    """How ids become documents."""

    dtype: np.dtype[Any]
    limit: int
    """Ids must be smaller."""
    eod: int | None

    def blocks(self, answer: Answer) -> dict[str, DocumentBlock]:
        """Make the block of each key."""
        blocks, begin = {}, 0
        for key, texts in answer.batch.texts.items():
            ids = answer.ids.part(begin, begin + len(texts.texts))
            begin += len(texts.texts)
            self._refuse_outside(ids, answer, texts)
            frame = replace(answer.frame, eod=self.eod)
            blocks[key] = lay_out(ids, texts.texts_of_documents(), frame, self.dtype)
            num_documents = blocks[key].sequences.size
            assert num_documents + len(answer.batch.rejected) == answer.batch.num_records, (
                "every record becomes a document or is rejected"
            )
        return blocks

    def _refuse_outside(self, ids: Ids, answer: Answer, texts: Texts) -> None:
        limit = min(self.limit, int(np.iinfo(self.dtype).max) + 1)
        framing = (*answer.frame.before, *answer.frame.after)
        if ids.flat.size and (int(ids.flat.max()) >= limit or int(ids.flat.min()) < 0):
            place = int(np.flatnonzero((ids.flat < 0) | (ids.flat >= limit))[0])
            token = int(ids.flat[place])
            text = int(np.searchsorted(np.cumsum(ids.lengths), place, side="right"))
        elif ids.lengths.size and max(framing, default=0) >= limit:
            token, text = max(framing), 0
        else:
            return
        where = answer.batch.where(texts.document_of(text))
        raise DataError(
            f"{where}: token id {token} is outside the vocabulary of {limit} ids. "
            "Use the tokenizer of the model, or mend --vocab-size."
        )
