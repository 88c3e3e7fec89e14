"""Texts of records, each accounted for by its place, whatever the format of the file.

A text is one string, or a list of strings (its sentences). What cannot be read as such is a bad
record, with its place and its reason; nothing else of its file is lost.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.errors import DataError

BLOCK_BYTES = 4 * 2**20
"""About how much text is read, encoded and written as one batch: a few are under way at a time."""


def json_kind(value: Any) -> str:
    """Say what a parsed value is, in the words of JSON."""
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


class BadRecordError(ValueError):
    """What is wrong with a record, and what to do; it knows no place."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that was left out."""

    where: str
    """`file:line`, or `file:row` (rows count from 1 too)."""
    reason: str
    """What is wrong with it, and what to do."""
    raw: bytes
    """The line, or what there is of the row."""

    def as_error(self) -> DataError:
        """Say the same as an error."""
        return DataError(f"{self.where}: {self.reason}")


@dataclass(slots=True)
class Texts:
    """The texts of one key, of D documents."""

    texts: list[str] = field(default_factory=list)
    """Sentences of all documents, one after another."""
    counts: list[int] | None = None
    """Sentences of each document; None: each document is one text."""

    def append(self, sentences: Sequence[str]) -> None:
        """Add a document."""
        if self.counts is None:
            self.counts = [1] * len(self.texts)
        self.counts.append(len(sentences))
        self.texts += sentences

    def document_of(self, text: int) -> int:
        """Name the document that a text belongs to."""
        if self.counts is None:
            return text
        return int(np.searchsorted(np.cumsum(self.counts), text, side="right"))

    def texts_of_documents(self) -> NDArray[np.int64] | None:
        """Give (D,) the number of sentences of each document; None: each is one text."""
        return None if self.counts is None else np.array(self.counts, np.int64)


@dataclass(frozen=True, slots=True)
class TextBatch:
    """The texts of neighbouring records of one unit."""

    texts: Mapping[str, Texts]
    """For each key, the same documents."""
    rejected: Mapping[int, Rejected]
    """Which of the records of the batch were left out."""
    num_records: int
    """Records read: documents and rejected ones."""
    stored_bytes: int
    """What reading them took from the file as it is stored, that is, compressed or not."""
    offset: int
    """Bytes of (decompressed) text, or rows, of the unit up to the end of this batch."""
    place: Callable[[int], str]
    """Names the place of the n-th record of the batch."""
    unit: int = 0
    """Number of the unit among all units."""

    def where(self, document: int) -> str:
        """Name the place of a document."""
        for record in self.rejected:
            document += record <= document
        return self.place(document)

    def all_texts(self) -> list[str]:
        """Give the texts of all keys, key by key."""
        return [text for texts in self.texts.values() for text in texts.texts]


@dataclass(slots=True)
class Taker:
    """Collects the texts of one batch, record by record."""

    keys: Sequence[str]
    place: Callable[[int], str]
    texts: dict[str, Texts] = field(init=False)
    rejected: dict[int, Rejected] = field(default_factory=dict)
    num_records: int = 0

    def __post_init__(self) -> None:
        self.texts = {key: Texts() for key in self.keys}

    def take(self, record: Any) -> None:
        """Add a parsed record.

        Raises:
            BadRecordError: it is no object, lacks a key, or holds something that is not text.
        """
        if not isinstance(record, dict):
            raise BadRecordError(
                f"{json_kind(record)} where an object is needed, "
                'such as {"text": "..."}. Mend or remove the record.'
            )
        found = [_sentences(record, key) for key in self.keys]
        for key, sentences in zip(self.keys, found, strict=True):
            self.texts[key].append(sentences)
        self.num_records += 1

    def take_all(self, columns: Sequence[list[str]]) -> None:
        """Make these the documents of an empty batch: for each key, one text for each record."""
        for key, column in zip(self.keys, columns, strict=True):
            self.texts[key] = Texts(column)
        self.num_records = len(columns[0])

    def reject(self, reason: str, raw: bytes) -> None:
        """Leave a record out."""
        where = self.place(self.num_records)
        self.rejected[self.num_records] = Rejected(where, reason, raw)
        self.num_records += 1

    def close(self, stored_bytes: int, offset: int) -> TextBatch:
        """Give the batch."""
        return TextBatch(
            self.texts, self.rejected, self.num_records, stored_bytes, offset, self.place
        )


def _sentences(record: Mapping[str, Any], key: str) -> Sequence[str]:
    if key not in record:
        raise BadRecordError(
            f"no key {key!r}; the line has {sorted(record)}. "
            "Mend the record, or name the key of the text with --json-keys."
        )
    value = record[key]
    sentences = value if isinstance(value, list) else [value]
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise BadRecordError(
                f"{key!r} holds {json_kind(sentence)} where text is needed. "
                "Mend or remove the record."
            )
        _refuse_lone_surrogates(sentence, key)
    return sentences


def _refuse_lone_surrogates(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"character {error.start + 1} of {key!r} is half of a surrogate pair, "
            "which is no text. Mend or remove the record."
        ) from error
