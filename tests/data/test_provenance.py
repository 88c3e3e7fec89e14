import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mlr1.data.index import meta_path
from megatron_mlr1.data.provenance import (
    EDGE_BYTES,
    CorpusRecord,
    read_record,
    record_files,
    refuse_packs,
    verify,
    write_record,
)
from megatron_mlr1.errors import ConfigError, DataError
from tests.support.corpora import patch, write_corpus


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A corpus of 600 kB of tokens."""
    write_corpus(tmp_path / "c", [300_000], [1])
    return f"{tmp_path}/c"


def record_of_corpus(prefix: str) -> CorpusRecord:
    return CorpusRecord(
        kind="documents",
        files=record_files(prefix),
        tokenizer={"type": "ByteLevelTokenizer", "eod": 0},
        append_eod=True,
        vocab_size=512,
        dtype="uint16",
        documents=1,
        sequences=1,
        tokens=300_000,
        inputs=[{"path": "a.jsonl", "bytes": 7}],
        shard=(1, 4),
        shuffled=3,
        tail_fraction=1 / 32,
    )


def test_what_was_written_is_read(prefix: str) -> None:
    assert read_record(prefix) is None
    record = record_of_corpus(prefix)
    write_record(prefix, record)
    assert read_record(prefix) == record
    verify(prefix, record, "full")


def test_the_edges_of_a_record_tell_its_files_apart(prefix: str, tmp_path: Path) -> None:
    record = record_of_corpus(prefix)
    assert record.edges == record_of_corpus(prefix).edges
    write_corpus(tmp_path / "d", [300_001], [1])
    assert record_of_corpus(f"{tmp_path}/d").edges != record.edges


@pytest.mark.parametrize("at", [0, EDGE_BYTES - 2, 600_000 - EDGE_BYTES, 599_998])
def test_the_quick_check_finds_a_change_at_the_ends(at: int, prefix: str) -> None:
    record = record_of_corpus(prefix)
    patch(Path(f"{prefix}.bin"), at, "H", 60_001)
    with pytest.raises(DataError, match=r"c\.bin has other bytes at its begin or end"):
        verify(prefix, record, "quick")


def test_only_the_full_check_finds_a_change_in_the_middle(prefix: str) -> None:
    record = record_of_corpus(prefix)
    patch(Path(f"{prefix}.bin"), 300_000, "H", 60_001)
    verify(prefix, record, "quick")
    with pytest.raises(DataError, match=r"c\.bin has the SHA-256 [0-9a-f]{64} where"):
        verify(prefix, record, "full")


def test_another_size_and_a_missing_file_are_named(prefix: str) -> None:
    record = record_of_corpus(prefix)
    with Path(f"{prefix}.idx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"c\.idx has 63 bytes where its record says 62"):
        verify(prefix, record, "quick")
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(DataError, match=r"c\.bin: No such file"):
        verify(prefix, record, "quick")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "format is 2, known is 1"),
        ({"kind": "songs"}, "kind is 'songs'"),
        ({"colour": "red"}, "colour"),
        ({"files": {"bin": {}}}, "no record"),
        ({"files": {}}, "its files are none"),
        ({"tokenizer": None}, "its tokenizer is None"),
        ({"vocab_size": "many"}, "its vocab_size is 'many'"),
        ({"inputs": 3}, "its inputs is 3"),
        (None, "no record"),
    ],
)
def test_a_record_of_another_form_is_refused(
    fields: dict[str, object] | None, message: str, prefix: str
) -> None:
    write_record(prefix, record_of_corpus(prefix))
    path = meta_path(prefix)
    data = path.read_text()
    path.write_text(data[:50] if fields is None else json.dumps(json.loads(data) | fields))
    with pytest.raises(DataError, match=message) as caught:
        read_record(prefix)
    assert "c.meta.json" in str(caught.value)


def test_packs_are_refused_where_documents_are_moved(prefix: str) -> None:
    record = record_of_corpus(prefix)
    refuse_packs(prefix, None, "tools/merge_data.py")
    refuse_packs(prefix, record, "tools/merge_data.py")
    with pytest.raises(ConfigError, match=r"packed samples.*tools/merge_data\.py moves documents"):
        refuse_packs(prefix, replace(record, kind="packs"), "tools/merge_data.py")


def test_a_record_that_is_nested_without_end_is_refused(prefix: str) -> None:
    meta_path(prefix).write_text("[" * 100_000)
    with pytest.raises(DataError, match="no record"):
        read_record(prefix)
