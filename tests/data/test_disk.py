import json
import os
from pathlib import Path

import pytest

from megatron_mlr1.data.disk import (
    file_size,
    read_blocks,
    refuse_existing,
    refuse_folders,
    refuse_little_room,
    refuse_nameless,
    remove,
    reopen,
    whole_file,
    write_json,
)
from megatron_mlr1.errors import ConfigError, DataError, MachineError


def test_json_appears_whole_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value in ({"a": [1, None]}, {"b": "ü"}):
        write_json(path, value)
        assert json.loads(path.read_bytes()) == value
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_json_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"missing: No such file .*Make that folder"):
        write_json(tmp_path / "missing" / "a.json", {})
    (tmp_path / "a.json").mkdir()
    with pytest.raises(MachineError, match=r"a\.json: Is a directory, so it cannot be written"):
        write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_json_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_removed_hides_no_other_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    remove(tmp_path / name for name in ("folder", "missing", "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_told_with_digits_that_say_so() -> None:
    with pytest.raises(MachineError, match=r"/proc has room for 0 bytes, and 5\.00 kB are to be"):
        refuse_little_room(Path("/proc"), 5000)


def test_a_folder_that_is_not_there_has_no_room(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, why in (("missing", "No such file"), ("file", "Not a directory")):
        with pytest.raises(MachineError, match=f"{name}: {why}.*Make that folder"):
            refuse_little_room(tmp_path / name, 1)


@pytest.mark.parametrize("prefix", ["", "a/", "a/.", ".."])
def test_a_prefix_without_a_name_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"names no file.*NAME"):
        refuse_nameless(prefix)


def test_a_folder_in_place_of_an_output_is_refused_and_a_name_too_long_is_told(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="is a folder, and a file"):
        refuse_folders(tmp_path / "a", tmp_path)
    for refuse in (refuse_folders, refuse_existing):
        with pytest.raises(MachineError, match="File name too long"):
            refuse(tmp_path / ("n" * 300))


def test_what_is_no_file_has_no_size_and_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    whys = {
        "folder": "Is a directory",
        "pipe": "Not a regular file",
        "loop": "Too many levels of symbolic links",
        "missing": "No such file or directory",
    }
    for name, why in whys.items():
        with pytest.raises(DataError, match=f"{name}: {why}, so it cannot be read"):
            file_size(tmp_path / name)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a", "--report") as file:
        file.write(b"new")
    opened = whole_file(tmp_path / "a", "--report")
    opened.__enter__().write(b"half")
    assert opened.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) is False
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"new")]
    for path in (tmp_path, Path(), Path("..")):
        with (
            pytest.raises(ConfigError, match=r"--report is .*a folder"),
            whole_file(path, "--report"),
        ):
            raise AssertionError("it was opened")


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
