"""Records of several columns: JSON lines, Parquet and Arrow, each record with its place."""

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from megatron_mlr1.data.chat_layouts import Layout, Record, detect
from megatron_mlr1.data.inputs import Unit
from megatron_mlr1.data.texts import json_kind
from megatron_mlr1.errors import DataError

BATCH_BYTES = 1 << 20
BATCH_ROWS = 64
"""Rows of a table that are read at once; a chat of reasoning is tens of kilobytes."""


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Some neighbouring records of one file, as bytes or as a table: cheap to hand to a worker."""

    path: str
    first: int
    """Number of the first record; a file begins with line, or row, 1."""
    layout: str
    """Name of the layout of this file."""
    lines: tuple[bytes, ...]
    """JSON lines; empty where `table` is there."""
    table: Any
    """A `pyarrow.RecordBatch` of the layout's columns, or None."""
    stored_bytes: int
    """What reading it took from the file as it is stored."""

    @property
    def num_records(self) -> int:
        """Count the records."""
        return len(self.lines) if self.table is None else self.table.num_rows

    def records(self) -> Iterator[tuple[str, Record | DataError]]:
        """Yield the place of each record, and the record or why there is none."""
        found = map(_parse, self.lines) if self.table is None else self._rows()
        for number, record in enumerate(found, start=self.first):
            yield f"{self.path}:{number}", record

    def _rows(self) -> Iterator[Record | DataError]:
        try:
            yield from self.table.to_pylist()
        except UnicodeDecodeError:  # before the first is given: look at each
            for row in range(self.num_records):
                try:
                    yield from self.table.slice(row, 1).to_pylist()
                except UnicodeDecodeError:
                    yield DataError("a text of this row is not UTF-8")


def read_records(unit: Unit, layout: Layout | None) -> Iterator[RecordBatch]:
    """Read the records of one input in order, in constant memory.

    Args:
        unit: a whole file.
        layout: how its records are laid out; None: as the first one that is JSON shows.

    Raises:
        DataError: the file is damaged or of no known layout.
    """
    if unit.kind == "jsonl":
        yield from _json_lines(unit, layout)
    elif unit.kind == "parquet":
        yield from _parquet(unit, layout)
    elif unit.kind == "arrow":
        yield from _arrow(unit, layout)
    else:
        raise DataError(
            f"{unit.path}: chats are read from files. Download the data set, for example with "
            "`hf download`, and name its folder."
        )


def _json_lines(unit: Unit, layout: Layout | None) -> Iterator[RecordBatch]:
    number, stored = 1, 0
    try:
        with open(unit.path, "rb") as file:
            stream = _decompressed(file, unit.path)
            while lines := stream.readlines(BATCH_BYTES):
                if layout is None:
                    layout = _layout_of(lines, unit.path, number)
                place = file.tell()
                yield RecordBatch(
                    unit.path, number, layout.name, tuple(lines), None, place - stored
                )
                number, stored = number + len(lines), place
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{unit.path}:{number}: cannot be read from here on: {error}. Copy the file again."
        ) from error


def _layout_of(lines: list[bytes], path: str, first: int) -> Layout:
    for number, line in enumerate(lines, start=first):
        record = _parse(line)
        if not isinstance(record, DataError):
            return detect(record, f"{path}:{number}")
    raise DataError(
        f"{path}: none of its first {len(lines)} lines is a JSON object. Give JSON lines."
    )


def _decompressed(file: BinaryIO, path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if path.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    return file


def _parquet(unit: Unit, layout: Layout | None) -> Iterator[RecordBatch]:
    import pyarrow
    from pyarrow import parquet

    number = 1
    try:
        file = parquet.ParquetFile(unit.path)
        columns = file.schema_arrow.names
        layout = layout or detect(dict.fromkeys(columns), unit.path)
        num_rows = max(1, file.metadata.num_rows)
        wanted = _wanted(layout, columns)
        for table in file.iter_batches(BATCH_ROWS, columns=wanted):
            part = unit.stored_bytes * table.num_rows // num_rows
            yield RecordBatch(unit.path, number, layout.name, (), table, part)
            number += table.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(unit.path, number, error) from error


def _arrow(unit: Unit, layout: Layout | None) -> Iterator[RecordBatch]:
    import pyarrow

    number = 1
    try:
        with pyarrow.memory_map(unit.path) as file, pyarrow.ipc.open_stream(file) as stream:
            columns = stream.schema.names
            layout = layout or detect(dict.fromkeys(columns), unit.path)
            wanted = _wanted(layout, columns)
            place = 0
            for whole in stream:
                for first in range(0, whole.num_rows, BATCH_ROWS):
                    table = whole.select(wanted).slice(first, BATCH_ROWS)
                    yield RecordBatch(
                        unit.path, number, layout.name, (), table, file.tell() - place
                    )
                    place = file.tell()
                    number += table.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(unit.path, number, error) from error


def _wanted(layout: Layout, columns: list[str]) -> list[str]:
    return [name for name in (*layout.columns, *layout.optional) if name in columns]


def _damaged(path: str, number: int, error: Exception) -> DataError:
    what = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return DataError(f"{path}:{number}: cannot be read from here on: {what}. Copy the file again.")


def _parse(line: bytes) -> Record | DataError:
    if line.isspace():
        return DataError("blank line; each line must hold one JSON object")
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return DataError(f"not JSON: {error}")
    if not isinstance(record, dict):
        return DataError(f"{json_kind(record)} where an object is needed")
    return record
