"""One corpus to several of whole documents, in constant memory; `merge` makes it one again."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.disk import refuse_nameless
from megatron_mlr1.data.provenance import (
    CorpusRecord,
    read_record,
    record_files,
    refuse_packs,
    write_record,
)
from megatron_mlr1.data.runs import DocumentRun, OnProgress, Place, WrittenCorpus, write_corpora
from megatron_mlr1.data.stored_index import (
    StoredIndex,
    count_tokens,
    open_index,
    refuse_wrong_documents,
    refuse_wrong_size,
)
from megatron_mlr1.errors import ConfigError, DataError

MOST_SHARDS = 99999
"""Five digits, so that the order of the names is the order of the shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPlan:
    """Into what a corpus is split: a number of shards, or shards of limited size."""

    input_prefix: str
    output_prefix: str
    """The shards are `{output_prefix}_00000_text_document`, `{output_prefix}_00001_...`."""
    num_shards: int | None = None
    """So many, of about equal tokens: no shard is more than a document away from its share."""
    max_tokens: int | None = None
    """As few as hold at most so many tokens each when filled in order."""
    overwrite: bool = False
    """Replace shards that are there."""

    def __post_init__(self) -> None:
        if (self.num_shards is None) == (self.max_tokens is None):
            raise ConfigError("Give either --num-shards or --max-tokens, and not both.")
        if self.num_shards is not None and not 1 <= self.num_shards <= MOST_SHARDS:
            raise ConfigError(
                f"--num-shards is {self.num_shards}; it must be 1 to {MOST_SHARDS}. Give another."
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"--max-tokens is {self.max_tokens}; a shard holds at least 1.")
        refuse_nameless(self.output_prefix)

    def shard_prefix(self, shard: int) -> str:
        """Name a shard, so that a mixture finds all of them in their folder."""
        return f"{self.output_prefix}_{shard:05d}_text_document"


def split(plan: SplitPlan, on_progress: OnProgress = lambda num_bytes: None) -> list[WrittenCorpus]:
    """Write the shards of a corpus in the order of its documents.

    Raises:
        ConfigError: shards are there, also such as an earlier split with more shards left.
        DataError: the corpus is damaged, or its documents are too long for such shards.
        MachineError: a folder is missing, or the disk is full or failed.
    """
    record = read_record(plan.input_prefix)
    refuse_packs(plan.input_prefix, record, "tools/split_data.py")
    index = open_index(plan.input_prefix)
    num_tokens = count_tokens(index)
    refuse_wrong_size(index, num_tokens)
    refuse_wrong_documents(index)
    if plan.num_shards is not None:
        cuts = _cuts_of_equal_tokens(index, num_tokens, plan.num_shards)
    else:
        assert plan.max_tokens is not None, "a plan has one of the two"
        cuts = _cuts_below(index, plan.max_tokens)
    places = [Place(0, 0, 0), *cuts, Place(index.num_documents, index.num_sequences, num_tokens)]
    if any(begin.tokens == end.tokens for begin, end in pairwise(places)):
        raise DataError(
            f"{plan.input_prefix} has {num_tokens} tokens in {index.num_documents} documents, "
            f"some so long that of {len(places) - 1} shards of equal size some would be empty. "
            "Choose fewer --num-shards."
        )
    if len(places) - 1 > MOST_SHARDS:
        raise ConfigError(
            f"--max-tokens {plan.max_tokens} makes {len(places) - 1} shards; at most "
            f"{MOST_SHARDS} can be named. Choose more tokens."
        )
    corpora = {
        plan.shard_prefix(shard): [DocumentRun(index, begin, end)]
        for shard, (begin, end) in enumerate(pairwise(places))
    }
    _refuse_leftovers(plan, corpora)
    shards = write_corpora(corpora, overwrite=plan.overwrite, on_progress=on_progress)
    if record is not None:
        for shard, begin in zip(shards, places, strict=False):
            write_record(shard.prefix, _part(record, shard, begin))
    return shards


def _part(record: CorpusRecord, shard: WrittenCorpus, begin: Place) -> CorpusRecord:
    """Make the record of a part of the corpus that `record` describes."""
    return replace(
        record,
        files=record_files(shard.prefix),
        documents=shard.num_documents,
        sequences=shard.num_sequences,
        tokens=shard.num_tokens,
        rejected=0,
        plan=None,
        tail_fraction=None,
        part_of={"sha256": record.files["bin"].sha256, "first_document": begin.documents},
    )


def _cuts_of_equal_tokens(index: StoredIndex, num_tokens: int, num_shards: int) -> list[Place]:
    """Cut after the first documents that reach 1/N, 2/N, ... of the tokens."""
    cuts: list[Place] = []
    for first, sequences, tokens in _places(index):
        while len(cuts) < num_shards - 1:
            share = -(-num_tokens * (len(cuts) + 1) // num_shards)
            at = int(np.searchsorted(tokens, share))
            if at == tokens.size:
                break
            cuts.append(Place(first + at, int(sequences[at]), int(tokens[at])))
    return cuts


def _cuts_below(index: StoredIndex, max_tokens: int) -> list[Place]:
    """Cut before the first documents that would make a shard larger than allowed."""
    cuts: list[Place] = []
    begin = 0
    for first, sequences, tokens in _places(index):
        while tokens[-1] > begin + max_tokens:
            at = int(np.searchsorted(tokens, begin + max_tokens, side="right")) - 1
            if tokens[at] == begin:
                raise DataError(
                    f"{index.prefix}: document {first + at} has {tokens[at + 1] - tokens[at]} "
                    f"tokens, more than --max-tokens {max_tokens}. A document is never split; "
                    "allow more."
                )
            begin = int(tokens[at])
            cuts.append(Place(first + at, int(sequences[at]), begin))
    return cuts


def _places(index: StoredIndex) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Give the number of a document and what lies before it and the next ones, in blocks.

    A block begins where the one before it ends, so that each can look back by one document.
    """
    first = 0
    sequences = tokens = np.zeros(1, np.int64)
    for ends, totals in index.totals():
        sequences = np.concatenate([sequences[-1:], ends])
        tokens = np.concatenate([tokens[-1:], totals])
        yield first, sequences, tokens
        first += ends.size


def _refuse_leftovers(plan: SplitPlan, prefixes: Iterable[str]) -> None:
    name = Path(plan.output_prefix).name
    shard = re.compile(rf"({re.escape(name)}_\d{{5}}_text_document)\.(?:bin|idx)")
    own = {Path(prefix).name for prefix in prefixes}
    folder = Path(plan.shard_prefix(0)).parent
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = shard.fullmatch(path.name)
        if found and found[1] not in own:
            raise ConfigError(
                f"{path} is left from another split. A mixture would read its tokens a second "
                "time; remove it first."
            )
