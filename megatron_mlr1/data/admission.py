"""What a corpus must be before a run trains on it: whole, of the run's tokenizer, and shuffled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mlr1.data.provenance import CorpusRecord, Level, read_record, verify
from megatron_mlr1.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTokenizer:
    """The tokenizer of a run, as far as it decides what ids mean."""

    name: str
    """The folder or file, for messages."""

    num_ids: int
    eod: int | None
    """The id that ends documents."""

    sha256: str | None
    """Of its files; None for a kind that no corpus is made with."""

    num_rows: int
    """Rows of the model's embedding."""


def admit(prefix: str, level: Level, tokenizer: RunTokenizer) -> None:
    """Hold a corpus against its record, and the record against the run; without one do nothing.

    Args:
        prefix: the corpus.
        level: `quick` compares sizes and the ends of the files, `full` every byte.
        tokenizer: the run's.

    Raises:
        DataError: a file is not the one that was written, or the tokenizer was another.
    """
    record = read_record(prefix)
    if record is None:
        _refuse_unrecorded_packs(prefix)
        return
    verify(prefix, record, level)
    if record.vocab_size > tokenizer.num_rows:
        raise DataError(
            f"{prefix} was made with a vocabulary of {record.vocab_size:,} ids and the model has "
            f"{tokenizer.num_rows:,} rows in its embedding; every id needs a row. Take the corpus "
            "of the model's tokenizer, or a model with a larger --padded-vocab-size."
        )
    _refuse_other_tokenizer(prefix, record.tokenizer, tokenizer)


def _refuse_unrecorded_packs(prefix: str) -> None:
    if Path(f"{prefix}.loss.bin").exists():
        raise DataError(
            f"{prefix}.loss.bin says which tokens of packed chats are trained, and their record "
            f"{prefix}.meta.json is missing: as plain documents all of them would be. Make the "
            "packs again with tools/preprocess_chat.py."
        )


def _refuse_other_tokenizer(
    prefix: str, recorded: Mapping[str, Any], tokenizer: RunTokenizer
) -> None:
    ours = {"sha256": tokenizer.sha256, "vocab_size": tokenizer.num_ids, "eod": tokenizer.eod}
    names = {"sha256": "SHA-256", "vocab_size": "number of ids", "eod": "end of document"}
    for key, name in names.items():
        theirs = recorded.get(key)
        if theirs is not None and ours[key] is not None and theirs != ours[key]:
            raise DataError(
                f"{prefix} was made with the tokenizer {recorded.get('model')} and this run has "
                f"{tokenizer.name}: their {name} differs ({theirs}, {ours[key]}), so ids may mean "
                "other text. Give the corpus's tokenizer by --tokenizer-model, or make the corpus "
                "again with the run's. --verify-data off trains all the same."
            )


def never_shuffled(prefixes: Sequence[str]) -> tuple[str, ...]:
    """Name the corpora whose documents stand in the order of their input, as far as is known.

    Packed chats are shuffled when they are packed.
    """
    records = ((prefix, read_record(prefix)) for prefix in prefixes)
    return tuple(prefix for prefix, record in records if _in_input_order(record))


def _in_input_order(record: CorpusRecord | None) -> bool:
    return record is None or (record.kind == "documents" and record.shuffled is None)
