"""A folder is there whole, or not at all."""

from pathlib import Path

import pytest

from megatron_mlr1.checkpoint.folder import whole_folder, write_text
from megatron_mlr1.errors import CheckpointError


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_and_fail(folder: Path) -> None:
    write_text(folder / "a", "1")
    raise KeyError


def test_it_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with whole_folder(target, overwrite=False) as folder:
        write_text(folder / "a", "1")
        assert not target.exists()
    assert names(tmp_path) == ["deep/out/a"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_folder(tmp_path / "out", overwrite=False) as folder:
        write_and_fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_what_would_have_been_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_text(tmp_path / "out/old", "1")
    with pytest.raises(KeyError), whole_folder(tmp_path / "out", overwrite=True):
        raise KeyError
    assert names(tmp_path) == ["out/old"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out", overwrite=False) as folder:
        write_text(folder / "a", "1")
    assert names(tmp_path) == ["out/a"]


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "folder"])
def test_what_is_there_is_replaced_only_on_demand(tmp_path: Path, is_file: bool) -> None:
    occupied = tmp_path / "out"
    if not is_file:
        occupied.mkdir()
    write_text(occupied if is_file else occupied / "old", "1")
    with (
        pytest.raises(CheckpointError, match="--overwrite"),
        whole_folder(occupied, overwrite=False),
    ):
        raise AssertionError("the block must not run")
    with whole_folder(occupied, overwrite=True) as folder:
        write_text(folder / "a", "1")
    assert names(tmp_path) == ["out/a"]


def test_two_that_write_the_same_folder_have_a_place_each(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out", overwrite=True) as first:
        write_text(first / "a", "1")
        with whole_folder(tmp_path / "out", overwrite=True) as second:
            write_text(second / "b", "2")
        assert names(tmp_path / "out") == ["b"]
    assert names(tmp_path) == ["out/a"]


def test_a_disk_that_fails_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match="could not be written"),
        whole_folder(tmp_path / "file" / "out", overwrite=False),
    ):
        raise AssertionError("the block must not run")
