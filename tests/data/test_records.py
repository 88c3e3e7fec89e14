import gzip
import json
from pathlib import Path

import pytest

from megatron_mlr1.data.records import LineBatch, find_files, parse_texts, read_batches
from megatron_mlr1.errors import DataError

GOOD = b'{"text": "good"}\n'


def batch(*lines: bytes) -> LineBatch:
    return LineBatch(Path("corpus.jsonl"), 7, list(lines), sum(map(len, lines)))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_come_in_order_with_their_numbers(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"c{suffix}"
    lines = [json.dumps({"text": "x" * (index % 50)}).encode() + b"\n" for index in range(1000)]
    lines[-1] = lines[-1].rstrip()
    data = b"".join(lines)
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)

    batches = list(read_batches(path, num_bytes=1000))

    assert len(batches) > 10
    assert [line for part in batches for line in part.lines] == lines
    assert [part.first_line for part in batches[1:]] == [
        part.first_line + len(part.lines) for part in batches[:-1]
    ]
    assert sum(part.num_stored_bytes for part in batches) == path.stat().st_size


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.touch()
    with pytest.raises(DataError, match=r"c\.jsonl is empty"):
        list(read_batches(path))


@pytest.mark.parametrize("damage", ["cut", "no gzip"])
def test_a_damaged_gzip_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 1000)[:-9] if damage == "cut" else GOOD)
    with pytest.raises(DataError, match=r"c\.jsonl\.gz:1: cannot be read"):
        list(read_batches(path))


def test_a_path_or_a_pattern_names_files_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "[odd].jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "d.jsonl").mkdir()

    assert find_files(f"{tmp_path}/c.txt") == [tmp_path / "c.txt"]
    assert find_files(f"{tmp_path}/[odd].jsonl") == [tmp_path / "[odd].jsonl"]
    found = [path.name for path in find_files(f"{tmp_path}/*.jsonl")]
    assert found == ["[odd].jsonl", "a.jsonl", "b.jsonl"]
    for pattern in (f"{tmp_path}/x*.jsonl", f"{tmp_path}/missing.jsonl", str(tmp_path)):
        with pytest.raises(DataError, match="no such file"):
            find_files(pattern)


def test_texts_are_taken_by_key() -> None:
    lines = batch(
        b'{"text": "one", "title": "1"}\n',
        b'{"title": "", "text": ["two", "three"], "other": 3}\r\n',
        b' {"text": "\\u00e9 \\ud83d\\ude42 \xc3\xa9", "title": []} ',
    )
    assert parse_texts(lines, ["text", "title"]) == [
        {"text": ["one"], "title": ["1"]},
        {"text": ["two", "three"], "title": [""]},
        {"text": ["é 🙂 é"], "title": []},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\n", "blank line"),
        (b" \t\r\n", "blank line"),
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b'{"text": "a\x00b"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'\xef\xbb\xbf{"text": "a"}', "not JSON"),
        (b'["text"]', "JSON list where an object is needed"),
        (b"null", "JSON NoneType where an object is needed"),
        (b'{"txt": "a", "id": 1}', r"no key 'text'; the line has \['id', 'txt'\]"),
        (b'{"text": null}', "'text' holds a NoneType"),
        (b'{"text": 3}', "'text' holds a int"),
        (b'{"text": ["a", 3]}', "'text' holds a int"),
        (b'{"text": {"a": "b"}}', "'text' holds a dict"),
        (b'{"text": "\xff"}', "byte 11 of the line is not UTF-8"),
        (b'{"text": "ab\\ud83d"}', "character 3 of 'text' is half of a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named_with_its_fault(line: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"^corpus\.jsonl:9: .*{message}"):
        parse_texts(batch(GOOD, GOOD, line, GOOD), ["text"])
