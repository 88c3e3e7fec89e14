import os
from pathlib import Path

import pytest

from megatron_mlr1.data.runs import BLOCK_BYTES, copy_bytes, whole_run, write_corpora
from megatron_mlr1.data.stored_index import count_tokens, open_index
from megatron_mlr1.errors import DataError, MachineError
from tests.support.corpora import names, write_corpus


def copied(source: Path, target: Path, begin: int, count: int) -> tuple[bool, list[int]]:
    reports: list[int] = []
    with source.open("rb") as read, target.open("ab+" if target.exists() else "wb") as write:
        whole = copy_bytes(read.fileno(), write.fileno(), begin, count, reports.append)
    return whole, reports


def test_bytes_are_copied_from_the_place_asked_for(tmp_path: Path) -> None:
    data = os.urandom(BLOCK_BYTES + 1000)
    (tmp_path / "a").write_bytes(data)
    whole, reports = copied(tmp_path / "a", tmp_path / "b", 7, len(data) - 10)
    assert whole
    assert (tmp_path / "b").read_bytes() == data[7:-3]
    assert sum(reports) == len(data) - 10


def test_a_source_that_the_kernel_does_not_copy_is_copied_by_blocks(tmp_path: Path) -> None:
    source = Path("/proc/version")  # made when it is read: to the kernel it has no bytes
    data = source.read_bytes()
    whole, reports = copied(source, tmp_path / "b", 2, len(data) - 2)
    assert whole
    assert (tmp_path / "b").read_bytes() == data[2:]
    assert sum(reports) == len(data) - 2


def test_a_source_that_ends_early_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert copied(tmp_path / "a", tmp_path / "b", 1, 3) == (False, [2])


def test_a_failure_leaves_neither_this_corpus_nor_those_before(tmp_path: Path) -> None:
    for name in "ab":
        write_corpus(tmp_path / name, [2, 3], [1, 1])
    indices = [open_index(f"{tmp_path}/{name}") for name in "ab"]
    runs = [whole_run(index, count_tokens(index)) for index in indices]
    os.truncate(tmp_path / "b.bin", 8)
    with pytest.raises(DataError, match=r"b\.bin became shorter"):
        write_corpora(
            {f"{tmp_path}/out{i}": [run] for i, run in enumerate(runs)},
            overwrite=False,
            on_progress=lambda num_bytes: None,
        )
    assert names(tmp_path) == ["a.bin", "a.idx", "b.bin", "b.idx"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [2], [1])
    run = whole_run(open_index(f"{tmp_path}/a"), 2)
    with pytest.raises(MachineError, match="missing: No such file"):
        write_corpora(
            {f"{tmp_path}/missing/out": [run]}, overwrite=False, on_progress=lambda num_bytes: None
        )
