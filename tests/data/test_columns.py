import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mlr1.data.columns import read_arrow, read_hub, read_parquet
from megatron_mlr1.data.inputs import Unit, find_units
from megatron_mlr1.data.texts import TextBatch
from megatron_mlr1.errors import ConfigError, DataError

READERS = {"parquet": read_parquet, "arrow": read_arrow, "hub": read_hub}


def write(path: Path, table: pa.Table, rows: int = 30) -> Path:
    """Write a table in pieces of some rows; an Arrow file as a stream, as `datasets` does."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        new = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=rows)
    return path


def read(unit: Unit, *keys: str, skip: int = 0, num_bytes: int = 700) -> list[TextBatch]:
    return list(READERS[unit.kind](unit, keys or ("text",), skip, num_bytes))


def the_unit(name: str, shard: tuple[int, int]) -> Unit:
    [unit] = find_units([name], shard)
    return unit


def texts(batches: list[TextBatch], key: str = "text") -> list[str]:
    return [text for batch in batches for text in batch.texts[key].texts]


def numbered(number: int) -> dict[str, list[Any]]:
    return {"n": list(range(number)), "text": [f"{n} é" * (n % 40 + 1) for n in range(number)]}


@pytest.mark.parametrize("name", ["c.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_every_row_comes_once_in_order_with_its_place(
    name: str, kind: pa.DataType, tmp_path: Path
) -> None:
    rows = numbered(200)
    table = pa.table({"n": rows["n"], "text": pa.array(rows["text"]).cast(kind)})
    path = write(tmp_path / name, table)
    [unit] = find_units([str(path)])

    batches = read(unit)

    assert len(batches) > 10
    assert texts(batches) == rows["text"]
    places = [batch.where(n) for batch in batches for n in range(batch.num_records)]
    assert places == [f"{path}:{n + 1}" for n in range(200)]
    assert [batch.offset for batch in batches][-1] == 200
    assert sum(batch.stored_bytes for batch in batches) == path.stat().st_size


@pytest.mark.parametrize("name", ["c.parquet", "stream.arrow"])
def test_parts_of_a_file_join_to_the_whole_and_reading_goes_on_at_any_border(
    name: str, tmp_path: Path
) -> None:
    rows = numbered(200)
    path = write(tmp_path / name, pa.table(rows))
    units = [unit for part in range(3) for unit in find_units([str(path)], (part, 3))]
    parts = [read(unit) for unit in units]
    assert len(parts) == 3
    assert texts([batch for part in parts for batch in part]) == rows["text"]
    first = len(texts(parts[0]))
    assert parts[1][0].where(0) == f"{path}:{first + 1}"

    for index, batch in enumerate(parts[1]):
        rest = read(units[1], skip=batch.offset)
        assert texts(parts[1][: index + 1]) + texts(rest) == texts(parts[1])
        if rest:
            assert rest[0].where(0) == f"{path}:{first + batch.offset + 1}"


@pytest.mark.parametrize("name", ["c.parquet", "stream.arrow"])
def test_a_bad_row_is_named_and_its_neighbours_are_kept(name: str, tmp_path: Path) -> None:
    values = pa.array([b"a", b"\xff", b"c", b"d"]).cast(pa.binary())
    broken = pa.StringArray.from_buffers(4, values.buffers()[1], values.buffers()[2])
    other = pa.array(["w", "x", None, "z"])
    path = write(tmp_path / name, pa.table({"text": broken, "other": other}))
    [unit] = find_units([str(path)])
    [batch] = read(unit, "text", "other")
    assert (texts([batch]), texts([batch], "other")) == (["a", "d"], ["w", "z"])
    assert batch.num_records == 4
    first, second = batch.rejected.values()
    assert first.where == f"{path}:2"
    assert first.reason.startswith("byte 1 of the text is not UTF-8")
    assert json.loads(first.raw)["other"] == "x"
    assert second.where == f"{path}:3"
    assert second.reason.startswith("'other' holds null where text is needed")
    assert [batch.where(document) for document in range(2)] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize("name", ["c.parquet", "stream.arrow"])
def test_lists_of_sentences_and_repeated_texts_are_texts(name: str, tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": [["a", "b"], [], ["c"]],
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        }
    )
    [unit] = find_units([str(write(tmp_path / name, table))])
    [batch] = read(unit, "text", "kind")
    assert batch.texts["text"].texts == ["a", "b", "c"]
    assert batch.texts["text"].counts == [2, 0, 1]
    assert texts([batch], "kind") == ["x", "y", "x"]


@pytest.mark.parametrize("name", ["c.parquet", "stream.arrow"])
def test_a_file_without_texts_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, pa.table({"n": [1], "text": ["a"]}))
    [unit] = find_units([str(path)])
    with pytest.raises(DataError, match=r"no column 'body'; the file has \['n', 'text'\]"):
        read(unit, "body")
    with pytest.raises(DataError, match="column 'n' holds int64 where texts"):
        read(unit, "n")
    write(path, pa.table({"text": pa.array([], pa.string())}))
    with pytest.raises(DataError, match="is empty"):
        read(unit)


@pytest.mark.parametrize("name", ["c.parquet", "stream.arrow"])
@pytest.mark.parametrize("shard", [(0, 1), (0, 2)])
def test_a_damaged_file_is_refused(name: str, shard: tuple[int, int], tmp_path: Path) -> None:
    path = write(tmp_path / name, pa.table(numbered(200)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        read(the_unit(str(path), shard))


@pytest.fixture
def streamed(tmp_path: Path) -> str:
    """Name a data set of three files as one of the hub; a folder stands for its repository."""
    for part in range(3):
        rows = [{"text": f"{part} {n}", "n": n} for n in range(20)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"part-{part}.jsonl").write_text(lines)
    return f"hf://{tmp_path}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_a_data_set_streams_in_order_goes_on_and_is_cut(streamed: str) -> None:
    [unit] = find_units([streamed])
    batches = read(unit, num_bytes=40)
    expected = [f"{part} {n}" for part in range(3) for n in range(20)]
    assert texts(batches) == expected
    assert batches[1].where(0) == f"{streamed}:{batches[0].num_records + 1}"
    rest = read(unit, skip=batches[2].offset)
    assert texts(batches[:3]) + texts(rest) == expected

    parts = [read(the_unit(streamed, (part, 2))) for part in range(2)]
    assert texts([batch for part in parts for batch in part]) == expected
    with pytest.raises(ConfigError, match="has 3 files"):
        read(the_unit(streamed, (0, 4)))


def test_a_data_set_that_cannot_be_had_is_refused(streamed: str) -> None:
    [unit] = find_units([f"{streamed}::test"])
    with pytest.raises(DataError, match="cannot be had"):
        read(unit)
    [unit] = find_units([streamed])
    [batch] = read(unit, "n", num_bytes=10**6)
    assert next(iter(batch.rejected.values())).reason.startswith("'n' holds a number")
    assert batch.num_records == 60
