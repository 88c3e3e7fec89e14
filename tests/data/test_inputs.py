import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mlr1.data.inputs import Unit, find_units, fingerprint
from megatron_mlr1.errors import ConfigError, DataError


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, content: bytes = b"{}\n") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def names(units: list[Unit]) -> list[str]:
    return [Path(unit.path).name for unit in units]


def test_files_folders_and_patterns_name_files_in_order(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("f/b.jsonl", "f/a.json.gz", "f/in/c.ndjson.zst", "f/README.md", "z.json"):
        write(name)
    for name in ("g/1.jsonl", "g/[odd].jsonl", "g/0.jsonl"):
        write(name)
    found = find_units([f"{tmp_path}/z.json", f"{tmp_path}/f", f"{tmp_path}/g/[01]*"])
    assert names(found) == [
        "z.json", "a.json.gz", "b.jsonl", "c.ndjson.zst", "0.jsonl", "1.jsonl",
    ]  # fmt: skip
    assert names(find_units([f"{tmp_path}/g/[odd].jsonl"])) == ["[odd].jsonl"]
    assert found[0] == Unit(f"{tmp_path}/z.json", "jsonl", 0, 3, 3)
    assert found[1] == Unit(f"{tmp_path}/f/a.json.gz", "jsonl", 0, None, 3)


def test_a_saved_data_set_gives_its_files_and_no_cache(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(saved, num_shards=2)
    (saved / "cache-1.arrow").write_bytes(b"x")
    units = find_units([str(saved)])
    assert names(units) == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert {unit.kind for unit in units} == {"arrow"}


def test_splits_of_a_saved_data_set_are_not_mixed(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="holds the splits train, test; a corpus is made of one"):
        find_units([str(tmp_path / "both")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("x*.jsonl", "no such file"),
        ("empty", "without files of known endings"),
        ("c.txt", r"the ending is none of \.jsonl, .*\.parquet, \.arrow"),
        ("none.jsonl", "is empty"),
    ],
)
def test_what_cannot_be_read_is_refused(
    name: str, message: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    write("c.txt")
    write("none.jsonl", b"")
    write("empty/README.md")
    with pytest.raises(DataError, match=message):
        find_units([f"{tmp_path}/{name}"])


def test_the_same_file_twice_is_refused_by_whatever_name(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(path)
    for inputs in ([str(path)] * 2, [str(tmp_path)], ["hf://org/name"] * 2):
        with pytest.raises(ConfigError, match="among the inputs twice"):
            find_units(inputs)


def test_shards_cut_plain_files_by_bytes_and_lose_none(write: Callable[..., Path]) -> None:
    inputs = [str(write(f"{n}.jsonl", b"x" * size)) for n, size in enumerate([100, 7, 1000])]
    for parts in (2, 3, 10):
        cut = [unit for part in range(parts) for unit in find_units(inputs, (part, parts))]
        for path in inputs:
            mine = [unit for unit in cut if unit.path == path]
            assert (mine[0].begin, mine[-1].end) == (0, Path(path).stat().st_size)
            assert all(a.end == b.begin for a, b in pairwise(mine))
        sizes = [
            sum(unit.stored_bytes for unit in find_units(inputs, (part, parts)))
            for part in range(parts)
        ]
        assert sum(sizes) == 1107
        assert max(sizes) - min(sizes) <= 1


def test_shards_take_whole_compressed_files_in_order(write: Callable[..., Path]) -> None:
    sizes = [10, 500, 10, 300, 300]
    inputs = [str(write(f"{n}.jsonl.gz", b"x" * size)) for n, size in enumerate(sizes)]
    parts = [names(find_units(inputs, (part, 3))) for part in range(3)]
    assert [name for part in parts for name in part] == [Path(path).name for path in inputs]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_shards_cut_tables_between_their_pieces(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"c.{kind}"
    table = pa.table({"text": [f"{n} " * 50 for n in range(1000)]})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=100)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=100)
    cuts = [find_units([str(path)], (part, 3)) for part in range(3)]
    borders = [(unit.begin, unit.end) for units in cuts for unit in units]
    assert len(borders) == 3
    assert borders[0][0] == 0
    assert borders[2][1] == 10
    assert [end for _, end in borders[:-1]] == [begin for begin, _ in borders[1:]]


@pytest.mark.parametrize(
    ("shard", "message"), [((3, 3), "--shard is 3/3"), ((0, 9), "--shard 0/9 gets none")]
)
def test_a_shard_that_cannot_be_is_refused(
    shard: tuple[int, int], message: str, write: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_units([str(write("a.jsonl.gz"))], shard)


def test_a_hub_data_set_is_cut_by_itself_and_not_with_others(write: Callable[..., Path]) -> None:
    assert find_units(["hf://a/b:c:d"], (1, 4)) == [Unit("hf://a/b:c:d", "hub", 1, 4, 0)]
    with pytest.raises(ConfigError, match="one hub data set or any number of files"):
        find_units(["hf://a/b", str(write("a.jsonl"))], (0, 2))


def test_a_fingerprint_notices_a_change_at_either_end_and_survives_json(
    write: Callable[..., Path],
) -> None:
    def digest(content: bytes) -> Any:
        units = find_units([str(write("a.jsonl", content)), "hf://a/b"])
        found = fingerprint(units)
        assert json.loads(json.dumps(found)) == found
        assert found[1] == {"path": "hf://a/b", "begin": 0, "end": 1}
        return found[0]["sha256"]

    content = b"x" * 200_000
    changed = [b"y" + content[1:], content[:-1] + b"y", content + b"x", content]
    assert len({digest(each) for each in changed}) == 4
    assert digest(content) == digest(content)


def test_what_cannot_be_looked_at_is_named(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    write("f/a.jsonl")
    (tmp_path / "f" / "b.jsonl").symlink_to("gone.jsonl")
    for name, message in (
        ("loop.jsonl", r"loop\.jsonl: cannot be read: Too many levels"),
        ("f", r"f/b\.jsonl: cannot be read: No such file"),
        ("n" * 300, "cannot be read: File name too long"),
    ):
        with pytest.raises(DataError, match=message):
            find_units([f"{tmp_path}/{name}"])
    with pytest.raises(ConfigError, match="names nothing"):
        find_units([""])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_dict.json", b""),
        ("dataset_dict.json", b'{"splits": []}'),
        ("dataset_dict.json", b'{"splits": 3}'),
        ("state.json", b"\xff"),
        ("state.json", b"{}"),
        ("state.json", b'{"_data_files": [{"filename": 3}]}'),
    ],
)
def test_a_damaged_list_of_a_saved_data_set_is_named(
    name: str, content: bytes, write: Callable[..., Path], tmp_path: Path
) -> None:
    write("saved/dataset_info.json")
    write(f"saved/{name}", content)
    with pytest.raises(DataError, match=rf"saved/{name} is not what `datasets` writes"):
        find_units([f"{tmp_path}/saved"])


def test_a_saved_data_set_that_lacks_a_file_is_named(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    write("saved/dataset_info.json")
    write("saved/state.json", b'{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(DataError, match=r"gone\.arrow: cannot be read"):
        find_units([f"{tmp_path}/saved"])
