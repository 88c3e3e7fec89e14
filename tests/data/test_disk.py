import json
from pathlib import Path

import pytest

from megatron_mlr1.data.disk import read_blocks, reopen, write_json
from megatron_mlr1.errors import DataError, MachineError


def test_json_appears_whole_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value in ({"a": [1, None]}, {"b": "ü"}):
        write_json(path, value)
        assert json.loads(path.read_bytes()) == value
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_json_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"missing/a\.json: No such file"):
        write_json(tmp_path / "missing" / "a.json", {})


def test_a_file_is_reopened_behind_what_counts(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abcdef")
    with reopen(path, 4) as file:
        file.write(b"X")
    assert path.read_bytes() == b"abcdX"
    with pytest.raises(DataError, match="a has 5 bytes where 6 were written"):
        reopen(path, 6)
    with reopen(tmp_path / "new", 0) as file:
        file.write(b"Y")
    assert b"".join(read_blocks(tmp_path / "new")) == b"Y"
