"""Whether a corpus is what it says: every number of the index and, on demand, every token."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mlr1.data.disk import names_the_file
from megatron_mlr1.data.index import bin_path, idx_path, meta_path
from megatron_mlr1.data.provenance import CorpusRecord, read_record, verify
from megatron_mlr1.data.runs import OnProgress
from megatron_mlr1.data.stored_index import (
    StoredIndex,
    count_tokens,
    open_index,
    refuse_wrong_begins,
    refuse_wrong_documents,
    refuse_wrong_size,
)
from megatron_mlr1.errors import ConfigError, DataError

BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class CheckedCorpus:
    """What a corpus without fault holds."""

    prefix: str
    num_documents: int
    num_sequences: int
    num_tokens: int
    dtype: np.dtype[Any]


def check(
    prefix: str, *, vocab_size: int | None = None, on_progress: OnProgress = lambda num_bytes: None
) -> CheckedCorpus:
    """Read a corpus in constant memory and refuse it with its first fault.

    Args:
        prefix: the corpus.
        vocab_size: token ids must be smaller; None: the tokens are not read.
        on_progress: called with the bytes of tokens read since the last call.

    Raises:
        ConfigError: `vocab_size` is below 1.
        DataError: a file is missing, cut short, does not fit the other, or holds a wrong number.
    """
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab-size is {vocab_size}; a vocabulary has at least 1 id.")
    index = open_index(prefix)
    num_tokens = count_tokens(index)
    refuse_wrong_documents(index)
    refuse_wrong_begins(index)
    refuse_wrong_size(index, num_tokens)
    if not num_tokens:
        raise DataError(f"{prefix} holds no tokens, and training cannot open it. Leave it out.")
    corpus = CheckedCorpus(
        prefix, index.num_documents, index.num_sequences, num_tokens, index.dtype
    )
    record = read_record(prefix)
    if record is not None:
        verify(prefix, record, "quick")
        _refuse_other_counts(corpus, record)
    if vocab_size is not None:
        _refuse_wrong_ids(index, vocab_size, on_progress)
    return corpus


def checksum(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits.

    Raises:
        DataError: it cannot be read.
    """
    with names_the_file(path, DataError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(prefix: str) -> dict[Path, str]:
    """Compute the SHA-256 of the files of a corpus, and hold them against its record.

    Raises:
        DataError: one cannot be read, or is not what the record says.
    """
    record = read_record(prefix)
    if record is not None:
        verify(prefix, record, "full")
        return {Path(f"{prefix}.{end}"): file.sha256 for end, file in record.files.items()}
    return {path: checksum(path) for path in (bin_path(prefix), idx_path(prefix))}


def _refuse_other_counts(corpus: CheckedCorpus, record: CorpusRecord) -> None:
    for name in ("documents", "sequences", "tokens"):
        found, must_be = getattr(corpus, f"num_{name}"), getattr(record, name)
        if found != must_be:
            raise DataError(
                f"{meta_path(corpus.prefix)} says {must_be} {name} where the corpus holds {found}. "
                "Copy the corpus again with its record."
            )


def _refuse_wrong_ids(index: StoredIndex, vocab_size: int, on_progress: OnProgress) -> None:
    path = bin_path(index.prefix)
    first = 0
    with names_the_file(path, DataError), path.open("rb") as file:
        while (tokens := np.fromfile(file, index.dtype, BLOCK_TOKENS)).size:
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                at = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
                raise DataError(
                    f"{path}: token {first + at} has the id {tokens[at]}; ids must be 0 to "
                    f"{vocab_size - 1} (--vocab-size {vocab_size}). Make the corpus again with "
                    "the tokenizer of the model, or give the vocabulary it was made with."
                )
            first += tokens.size
            on_progress(tokens.nbytes)
