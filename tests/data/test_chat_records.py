import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_mlr1.data import chat_records
from megatron_mlr1.data.chat_layouts import LAYOUTS
from megatron_mlr1.data.chat_records import RecordBatch, read_records
from megatron_mlr1.data.inputs import Unit, find_units
from megatron_mlr1.errors import DataError
from tests.support.chats import chat

RECORDS = [{"id": str(n), "messages": chat(f"q{n} é" * 20, "a" * n)} for n in range(300)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def read(path: Path, **options: Any) -> list[RecordBatch]:
    (unit,) = find_units([str(path)])
    return list(read_records(unit, options.get("layout")))


def flat(batches: list[RecordBatch]) -> list[tuple[str, Any]]:
    return [row for batch in batches for row in batch.records()]


@pytest.fixture(params=["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"chats.{request.param}"
    table = pa.Table.from_pylist(RECORDS)
    if request.param == "parquet":
        pq.write_table(table, path, row_group_size=70)
    elif request.param == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=70)
    else:
        stored = {".gz": gzip.compress(LINES), ".zst": zstandard.compress(LINES)}
        path.write_bytes(stored.get(path.suffix, LINES))
    return path


def test_every_record_is_read_with_its_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_records, "BATCH_BYTES", 5_000)
    batches = read(path)
    assert len(batches) > 3
    rows = flat(batches)
    assert [where for where, _ in rows] == [f"{path}:{n}" for n in range(1, 301)]
    assert [row["messages"] for _, row in rows] == [record["messages"] for record in RECORDS]
    assert {batch.layout for batch in batches} == {"messages"}
    assert sum(batch.num_records for batch in batches) == 300


def test_a_damaged_file_is_named(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    if path.suffix == ".jsonl":
        *whole, (where, last) = flat(read(path))
        assert not any(isinstance(row, DataError) for _, row in whole)
        assert isinstance(last, DataError)
        assert where == f"{path}:{len(whole) + 1}"
        return
    with pytest.raises(DataError, match=str(path)):
        read(path)


def test_a_line_that_is_no_object_is_handed_over_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'\n[1]\n{"prompt": \n{"prompt": "q", "response": "a"}\n\xff\n')
    (batch,) = read(path)
    assert batch.layout == "prompt-response"
    reasons = [str(row) if isinstance(row, DataError) else "fine" for _, row in batch.records()]
    assert reasons[0].startswith("blank line")
    assert reasons[1] == "a list where an object is needed"
    assert reasons[2].startswith("not JSON")
    assert reasons[3] == "fine"
    assert reasons[4].startswith("not JSON")


def test_a_file_without_any_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("1\n2\n")
    with pytest.raises(DataError, match="none of its first 2 lines is a JSON object"):
        read(path)


def test_a_table_is_read_by_the_columns_of_its_layout(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    pq.write_table(pa.table({"input": ["q"], "output": ["a"], "other": [1]}), path)
    assert flat(read(path)) == [(f"{path}:1", {"input": "q", "output": "a"})]
    pq.write_table(pa.table({"text": ["q"]}), path)
    with pytest.raises(DataError, match="of no known layout"):
        read(path)
    assert flat(read(path, layout=LAYOUTS["input-output"])) == [(f"{path}:1", {})]


def test_a_set_on_the_hub_must_be_downloaded_first() -> None:
    with pytest.raises(DataError, match="Download the data set"):
        list(read_records(Unit("hf://a/b", "hub", 0, 1, 0), None))


def test_a_row_whose_text_is_not_utf8_is_handed_over_with_its_reason(tmp_path: Path) -> None:
    offsets, text = np.array([0, 1, 2], "<i4").tobytes(), b"a\xff"
    prompts = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(text)]
    )
    path = tmp_path / "chats.parquet"
    pq.write_table(pa.table({"prompt": prompts, "response": ["b", "c"]}), path)
    (batch,) = read(path)
    (_, first), (where, second) = batch.records()
    assert first == {"prompt": "a", "response": "b"}
    assert where == f"{path}:2"
    assert isinstance(second, DataError)
    assert "not UTF-8" in str(second)
