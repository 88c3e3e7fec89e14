"""Records of JSON lines: one object a line, each line accounted for by its file and number."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mlr1.errors import DataError


@dataclass(frozen=True, slots=True)
class LineBatch:
    """Some neighbouring lines of one file."""

    path: Path
    first_line: int
    """Number of the first line; a file begins with line 1."""
    lines: list[bytes]
    num_stored_bytes: int
    """What reading them took from the file as it is stored, that is, compressed or not."""

    def where(self, index: int) -> str:
        """Name a line as `file:number`."""
        return f"{self.path}:{self.first_line + index}"


def find_files(pattern: str) -> list[Path]:
    """List the files that one path or one pattern (`*`, `?`, `[...]`) names, sorted by name.

    Raises:
        DataError: there is none.
    """
    paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob(pattern)))
    files = [path for path in paths if path.is_file()]
    if not files:
        raise DataError(f"{pattern}: no such file. Give a JSON-lines file, or a pattern in quotes.")
    return files


def read_batches(path: Path, num_bytes: int = 2**20) -> Iterator[LineBatch]:
    """Read the lines of a file, plain or `.gz`, in batches of about `num_bytes` of text.

    Raises:
        DataError: the file cannot be read, is damaged, or is empty.
    """
    first_line, stored = 1, 0
    try:
        with path.open("rb") as file:
            stream = _decompressed(file) if path.suffix == ".gz" else file
            while lines := stream.readlines(num_bytes):
                yield LineBatch(path, first_line, lines, file.tell() - stored)
                first_line, stored = first_line + len(lines), file.tell()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}:{first_line}: cannot be read from here on: {error}. Copy the file again."
        ) from error
    if first_line == 1:
        raise DataError(f"{path} is empty; a corpus needs at least one document. Leave it out.")


def parse_texts(batch: LineBatch, keys: Sequence[str]) -> list[dict[str, list[str]]]:
    """Take the texts of each line: a text is one string, or a list of strings (its sentences).

    Returns:
        For each line, for each key, the sentences; one for a plain string.

    Raises:
        DataError: a line is blank, is not UTF-8, is no JSON object, lacks a key, or holds
            something that is not text.
    """
    return [
        {key: _sentences(record, key, batch.where(index)) for key in keys}
        for index, line in enumerate(batch.lines)
        for record in [_parse(line, batch.where(index))]
    ]


def _decompressed(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(gzip.GzipFile(fileobj=file))


def _parse(line: bytes, where: str) -> dict[str, Any]:
    if line.isspace():
        raise DataError(f"{where}: blank line; each line must hold one JSON object. Remove it.")
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start + 1} of the line is not UTF-8. Convert the file to UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}. Mend or remove the line.") from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON {type(record).__name__} where an object is needed, "
            'such as {"text": "..."}. Mend or remove the line.'
        )
    return record


def _sentences(record: dict[str, Any], key: str, where: str) -> list[str]:
    if key not in record:
        raise DataError(
            f"{where}: no key {key!r}; the line has {sorted(record)}. "
            "Mend the line, or name the key of the text with --json-keys."
        )
    value = record[key]
    sentences = value if isinstance(value, list) else [value]
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise DataError(
                f"{where}: {key!r} holds a {type(sentence).__name__} where text is needed. "
                "Mend or remove the line."
            )
        _refuse_lone_surrogates(sentence, key, where)
    return sentences


def _refuse_lone_surrogates(text: str, key: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} of {key!r} is half of a surrogate pair, "
            "which is no text. Mend or remove the line."
        ) from error
