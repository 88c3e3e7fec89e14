"""Records of chats to a corpus of packs: tokenize to a spill, pack by the lengths, write in order.

The first pass reads and tokenizes, in worker processes, and writes the tokens to a file that only
this run knows; of each chat only the length stays in memory. The second reads chat after chat in
the order of the packs. Memory is about 30 bytes a chat and a few batches, whatever the number of
tokens; the disk holds the tokens twice until the end (4 bytes each in the spill).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mlr1.data.chat_encode import ChatEncoding, EncodedChats, encode_in_order
from megatron_mlr1.data.chat_layouts import Layout, named, read_questions
from megatron_mlr1.data.chat_records import RecordBatch, read_records
from megatron_mlr1.data.chat_template import ChatTokenizer, load_chat_tokenizer
from megatron_mlr1.data.disk import refuse_existing, refuse_folders, refuse_nameless
from megatron_mlr1.data.encode import describe_tokenizer
from megatron_mlr1.data.index import bin_path, idx_path, meta_path
from megatron_mlr1.data.inputs import Unit, find_units, fingerprint
from megatron_mlr1.data.pack_files import PackWriter, Rejects, Spill, loss_path
from megatron_mlr1.data.packing import pack, refuse_pack_length
from megatron_mlr1.data.provenance import CorpusRecord, FileRecord
from megatron_mlr1.data.tokenizers import TokenizerPlan
from megatron_mlr1.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPlan:
    """What to read and what to write."""

    inputs: tuple[str, ...]
    """Files, folders and patterns, as `inputs.find_units` takes them."""
    output_prefix: str
    """The corpus is `{output_prefix}_chat_document`."""
    encoding: ChatEncoding
    workers: int
    """Processes that tokenize."""
    layout: str | None = None
    """Name of the layout of all files; None: each file's first record shows it."""
    skip_bad: bool = False
    """Leave out records that are no chats; otherwise the first one stops the run."""
    seed: int = 1234
    """Of the order of chats and packs."""
    overwrite: bool = False
    """Replace a corpus that is there."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}; tokenizing needs at least 1.")
        refuse_nameless(self.output_prefix)
        refuse_pack_length(self.encoding.pack_length)
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must be 0 or more.")

    @property
    def prefix(self) -> str:
        """Name the corpus."""
        return f"{self.output_prefix}_chat_document"

    @property
    def rejected_path(self) -> Path:
        """Name the file of what was left out."""
        return Path(f"{self.output_prefix}.rejected.jsonl")


@dataclass(slots=True)
class ChatSummary:
    """What a run did."""

    prefix: str
    pack_length: int
    records: int = 0
    chats: int = 0
    packs: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut: int = 0
    """Chats that were cut to the length of a pack."""
    too_long: int = 0
    """Chats that were left out since they do not fit into a pack."""
    longest: int = 0
    """Tokens of the longest of those."""
    is_fast: bool = True
    """Whether gigatoken made all ids."""
    reasons: Counter[str] = field(default_factory=Counter)
    """How often each other reason left a record out; numbers in it are put as N."""

    @property
    def rejected(self) -> int:
        """Records that are no chats."""
        return self.reasons.total()

    @property
    def fill(self) -> float:
        """Share of the places in packs that hold a token."""
        return self.tokens / (self.packs * self.pack_length)


def make_packs(
    plan: ChatPlan, on_progress: Callable[[int, int], object] = lambda records, stored_bytes: None
) -> ChatSummary:
    """Make a corpus of packs; all its files are finished together or none is left.

    Args:
        plan: what to read and write.
        on_progress: told after each batch how many records and how many bytes of the input files
            it was.

    Raises:
        ConfigError: an output exists, or the tokenizer has no template.
        DataError: a file or (unless they are skipped) a record is wrong, or no chat is left.
        MachineError: a file cannot be written, or a worker died.
    """
    tokenizer = load_chat_tokenizer(plan.encoding.tokenizer_model, plan.encoding.train_on)
    if plan.encoding.questions is not None:
        read_questions(plan.encoding.questions)  # a fault in it is named here, not by a worker
    layout = None if plan.layout is None else named(plan.layout)
    units = find_units(plan.inputs)
    described = _describe(plan, tokenizer, units)
    prefix = plan.prefix
    targets = bin_path(prefix), idx_path(prefix), loss_path(prefix), meta_path(prefix)
    if not plan.overwrite:
        refuse_existing(*targets, plan.rejected_path)
    refuse_folders(*targets, plan.rejected_path)
    summary = ChatSummary(plan.prefix, plan.encoding.pack_length)
    with ExitStack() as stack:
        spill = Spill(Path(f"{plan.prefix}.chats.partial"))
        stack.callback(spill.remove)
        rejects = Rejects(plan.rejected_path, stop=not plan.skip_bad)
        stack.callback(rejects.discard)
        for batch in encode_in_order(_batches(units, layout), plan.encoding, plan.workers):
            _count(summary, batch)
            rejects.write(batch.refused)
            spill.write(batch)
            on_progress(batch.num_records, batch.stored_bytes)
        _refuse_nothing(summary)
        packs = pack(spill.lengths, summary.pack_length, plan.seed)
        summary.packs = packs.sizes.size
        writer = PackWriter(plan.prefix, tokenizer.dtype, overwrite=plan.overwrite)
        stack.callback(writer.discard)
        for words, lengths, sizes in spill.in_order(packs):
            writer.write(words, lengths, sizes)
        summary.trained_tokens = writer.trained_tokens
        writer.publish(partial(_record, summary, described))
        rejects.publish()
    return summary


def _batches(units: list[Unit], layout: Layout | None) -> Iterator[RecordBatch]:
    for unit in units:
        yield from read_records(unit, layout)


def _count(summary: ChatSummary, batch: EncodedChats) -> None:
    summary.records += batch.num_records
    summary.chats += batch.lengths.size
    summary.tokens += batch.words.size
    summary.cut += batch.num_cut
    summary.is_fast &= batch.is_fast
    for refused in batch.refused:
        if refused.num_tokens is None:
            summary.reasons[re.sub(r"\d+", "N", refused.reason)] += 1
        else:
            summary.too_long += 1
            summary.longest = max(summary.longest, refused.num_tokens)


def _refuse_nothing(summary: ChatSummary) -> None:
    counted = summary.chats + summary.too_long + summary.rejected
    assert counted == summary.records, "every record is a chat, too long, or rejected"
    if summary.chats == 0:
        rejected = "".join(f" {n:,} x {why}." for why, n in summary.reasons.most_common(1))
        raise DataError(
            f"None of {summary.records:,} records is a chat of at most {summary.pack_length:,} "
            f"tokens: {summary.too_long:,} are longer, {summary.rejected:,} are no chats.{rejected}"
            " Give a larger --pack-length, or chats."
        )


def _describe(plan: ChatPlan, tokenizer: ChatTokenizer, units: Sequence[Unit]) -> dict[str, Any]:
    """Give what the record says and is known before any chat is read."""
    model = TokenizerPlan(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=plan.encoding.tokenizer_model
    )
    template = str(tokenizer.tokenizer.chat_template)
    return {
        "tokenizer": describe_tokenizer(model),
        "vocab_size": len(tokenizer.tokenizer),
        "dtype": tokenizer.dtype.name,
        "inputs": fingerprint(units),
        "shuffled": plan.seed,
        "extra": {
            "train_on": plan.encoding.train_on,
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        },
    }


def _record(
    summary: ChatSummary, described: dict[str, Any], files: Mapping[str, FileRecord]
) -> CorpusRecord:
    return CorpusRecord(
        kind="packs",
        files=files,
        append_eod=False,
        documents=summary.packs,
        sequences=summary.chats,
        tokens=summary.tokens,
        rejected=summary.rejected + summary.too_long,
        pack_length=summary.pack_length,
        trained_tokens=summary.trained_tokens,
        **described,
    )
