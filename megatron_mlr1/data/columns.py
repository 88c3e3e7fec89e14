"""Rows of Parquet files, Arrow files and hub data sets, each row accounted for.

Imported only where such a file is read: pyarrow takes its time and memory.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from megatron_mlr1.data.inputs import HUB, Unit, missing_package
from megatron_mlr1.data.texts import BadRecordError, Taker, TextBatch
from megatron_mlr1.errors import ConfigError, DataError

MAX_ROWS = 2**16


def piece_sizes(unit: Unit) -> list[int]:
    """Give the bytes of each row group of a Parquet file, or of each record batch of an Arrow file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        if unit.kind == "parquet":
            groups = pa.parquet.read_metadata(unit.path)
            return [groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)]
        with pa.memory_map(unit.path) as file:
            return [batch.nbytes for batch in _record_batches(file)]
    except (OSError, pa.ArrowException) as error:
        raise _damaged(unit.path, error) from error


def read_parquet(unit: Unit, keys: Sequence[str], skip: int, num_bytes: int) -> Iterator[TextBatch]:
    """Read the rows of a unit, from its row `skip` on, in batches of about `num_bytes` of text.

    Raises:
        DataError: the file cannot be read, has no such column, or its column holds no texts.
    """
    try:
        # Buffered: a row group is not held whole.
        with pa.parquet.ParquetFile(unit.path, buffer_size=2**20, pre_buffer=False) as file:
            _refuse_columns(file.schema_arrow, keys, unit.path)
            rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            end = len(rows) if unit.end is None else unit.end
            first, total, left_out = sum(rows[: unit.begin]), sum(rows[unit.begin : end]), 0
            _refuse_empty(unit.path, sum(rows))
            groups = list(range(unit.begin, end))
            while groups and left_out + rows[groups[0]] <= skip:
                left_out += rows[groups.pop(0)]
            tables = file.iter_batches(
                _rows_of(file, keys, groups, num_bytes), row_groups=groups, columns=list(keys)
            )
            tables = _without(tables, skip - left_out)
            yield from _take_rows(tables, unit, keys, (first, skip, total), num_bytes)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(unit.path, error) from error


def read_arrow(unit: Unit, keys: Sequence[str], skip: int, num_bytes: int) -> Iterator[TextBatch]:
    """Read the rows of a unit as `read_parquet` does, of a file as `datasets` saves it.

    Raises:
        DataError: the file cannot be read, has no such column, or its column holds no texts.
    """
    try:
        with pa.memory_map(unit.path) as file:
            sizes = [batch.num_rows for batch in _record_batches(file)]
        end = len(sizes) if unit.end is None else unit.end
        first, total = sum(sizes[: unit.begin]), sum(sizes[unit.begin : end])
        _refuse_empty(unit.path, sum(sizes))
        # Not mapped: what was read of a map counts as this process's memory.
        with pa.OSFile(unit.path) as file:
            tables = _record_batches(file, lambda schema: _refuse_columns(schema, keys, unit.path))
            chosen = (
                batch.select(list(keys))
                for index, batch in enumerate(tables)
                if unit.begin <= index < end
            )
            yield from _take_rows(
                _without(chosen, skip), unit, keys, (first, skip, total), num_bytes
            )
    except (OSError, pa.ArrowException) as error:
        raise _damaged(unit.path, error) from error


def read_hub(unit: Unit, keys: Sequence[str], skip: int, num_bytes: int) -> Iterator[TextBatch]:
    """Stream the rows of a shard of a hub data set, from its row `skip` on.

    Raises:
        ConfigError: the name is none, or the data set has fewer files than shards are wanted.
        DataError: it cannot be had.
        MachineError: the package `datasets` is missing.
    """
    taker, size, taken = Taker(keys, partial(_place, unit.path, skip)), 0, skip
    for row in _hub_rows(unit, keys, skip):
        taken += 1
        try:
            taker.take(row)
        except BadRecordError as reason:
            taker.reject(str(reason), _raw(row))
        size += sum(len(str(value)) for value in row.values())
        if size >= num_bytes or taker.num_records >= MAX_ROWS:
            yield taker.close(0, taken)
            taker, size = Taker(keys, partial(_place, unit.path, taken)), 0
    if taker.num_records:
        yield taker.close(0, taken)


def _hub_rows(unit: Unit, keys: Sequence[str], skip: int) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise missing_package(error, unit.path) from error
    name, config, split = (unit.path.removeprefix(HUB) + "::").split(":")[:3]
    if not name:
        raise ConfigError(f"{unit.path} names no data set. Write hf://org/name[:config][:split].")
    try:
        stream = datasets.load_dataset(
            name, config or None, split=split or "train", streaming=True
        ).select_columns(list(keys))
        if unit.end is not None and unit.end > 1:
            if stream.num_shards < unit.end:
                raise ConfigError(
                    f"{unit.path} has {stream.num_shards} files and is cut between them; --shard "
                    f"asks for {unit.end} parts. Use at most {stream.num_shards}."
                )
            stream = stream.shard(num_shards=unit.end, index=unit.begin, contiguous=True)
        yield from stream.skip(skip)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{unit.path} cannot be had: {error}. Mend the name (hf://org/name:config:split), the "
            "name of its column (--json-keys) or the connection."
        ) from error


def _record_batches(
    file: Any, check: Callable[[pa.Schema], None] = lambda schema: None
) -> Iterator[pa.RecordBatch]:
    """Read the record batches of a stream, which `datasets` writes, or of an Arrow file."""
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        reader = pa.ipc.open_file(file)
        check(reader.schema)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        stream = pa.ipc.open_stream(file)
        check(stream.schema)
        yield from stream


def _refuse_columns(schema: pa.Schema, keys: Sequence[str], path: str) -> None:
    for key in keys:
        if key not in schema.names:
            raise DataError(
                f"{path}: no column {key!r}; the file has {sorted(schema.names)}. "
                "Name the column of the text with --json-keys."
            )
        if not _holds_texts(schema.field(key).type):
            raise DataError(
                f"{path}: column {key!r} holds {schema.field(key).type} where texts or lists of "
                "texts are needed. Name another with --json-keys."
            )


def _holds_texts(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_texts(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_texts(kind.value_type)
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def _rows_of(file: Any, keys: Sequence[str], groups: Sequence[int], num_bytes: int) -> int:
    """Estimate how many rows make a batch."""
    rows = size = 1
    for group in (file.metadata.row_group(index) for index in groups):
        columns = (group.column(index) for index in range(group.num_columns))
        wanted = [column for column in columns if column.path_in_schema.split(".")[0] in keys]
        size += sum(column.total_uncompressed_size for column in wanted)
        rows += group.num_rows
    return max(1, min(MAX_ROWS, rows * num_bytes // size))


def _without(tables: Iterator[pa.RecordBatch], skip: int) -> Iterator[pa.RecordBatch]:
    """Leave the first `skip` rows out."""
    for table in tables:
        left_out = min(skip, table.num_rows)
        skip -= left_out
        if left_out < table.num_rows:
            yield table.slice(left_out)


def _take_rows(
    tables: Iterator[pa.RecordBatch],
    unit: Unit,
    keys: Sequence[str],
    rows: tuple[int, int, int],
    num_bytes: int,
) -> Iterator[TextBatch]:
    """Take rows; `rows`: of the file before the unit, of the unit before these, and its number."""
    before, done, total = rows
    for table in tables:
        step = max(1, table.num_rows * num_bytes // max(1, table.nbytes))
        cuts = [*range(0, table.num_rows, step), table.num_rows]
        for begin, end in pairwise(cuts):
            taker = Taker(keys, partial(_place, unit.path, before + done))
            _take_columns([table.column(key).slice(begin, end - begin) for key in keys], taker)
            stored = unit.stored_bytes * done // total
            done += end - begin
            yield taker.close(unit.stored_bytes * done // total - stored, done)


def _take_columns(columns: Sequence[pa.Array], taker: Taker) -> None:
    try:
        values = [column.to_pylist() for column in columns]
    except UnicodeDecodeError:
        values = [[_value(cell) for cell in column] for column in columns]
    if all({*map(type, column)} == {str} for column in values):
        taker.take_all(values)
        return
    for row in zip(*values, strict=True):
        record = dict(zip(taker.keys, row, strict=True))
        try:
            wrong = next((value for value in row if isinstance(value, BadRecordError)), None)
            if wrong is not None:
                raise wrong
            taker.take(record)
        except BadRecordError as reason:
            taker.reject(str(reason), _raw(record))


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return BadRecordError(
            f"byte {error.start + 1} of the text is not UTF-8. Mend or remove the record."
        )


def _raw(record: dict[str, Any]) -> bytes:
    """Show a row as a JSON line, as far as it can be shown."""
    return orjson.dumps(record, default=repr, option=orjson.OPT_NON_STR_KEYS)


def _place(path: str, first: int, index: int) -> str:
    return f"{path}:{first + index + 1}"


def _refuse_empty(path: str, num_rows: int) -> None:
    if num_rows == 0:
        raise DataError(f"{path} is empty; it needs at least one document. Leave it out.")


def _damaged(path: str, error: Exception) -> DataError:
    what = str(error).rstrip(".")
    return DataError(f"{path}: cannot be read: {what}. Copy the file again.")
