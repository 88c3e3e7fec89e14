import gzip
import json
import random
from pathlib import Path

import pytest
import zstandard

from megatron_mlr1.data.inputs import Unit, find_units
from megatron_mlr1.data.records import read_lines
from megatron_mlr1.data.texts import TextBatch
from megatron_mlr1.errors import DataError

GOOD = b'{"text": "good"}\n'
ENDINGS = [".jsonl", ".jsonl.gz", ".jsonl.zst"]


def packed(data: bytes, ending: str) -> bytes:
    """Data as a file of this ending has it: in two members, or frames."""
    half = len(data) // 2
    if ending.endswith(".gz"):
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    if ending.endswith(".zst"):
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return data


def some_lines(number: int) -> list[bytes]:
    draw = random.Random(5)
    texts = ["é" * draw.choice([0, 3, 30, 300, 3000]) for _ in range(number)]
    lines = [
        json.dumps({"text": text, "n": str(n)}).encode() + b"\n" for n, text in enumerate(texts)
    ]
    lines[-1] = lines[-1].rstrip()
    return lines


def read(path: Path, skip: int = 0, num_bytes: int = 1000) -> list[TextBatch]:
    [unit] = find_units([str(path)])
    return list(read_lines(unit, ["text", "n"], skip, num_bytes))


def numbers(batches: list[TextBatch]) -> list[str]:
    return [text for batch in batches for text in batch.texts["n"].texts]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_line_comes_once_in_order_with_its_place(ending: str, tmp_path: Path) -> None:
    lines = some_lines(500)
    path = tmp_path / f"c{ending}"
    path.write_bytes(packed(b"".join(lines), ending))

    batches = read(path)

    assert len(batches) > 10
    assert numbers(batches) == [str(n) for n in range(500)]
    texts = [text for batch in batches for text in batch.texts["text"].texts]
    assert texts == [json.loads(line)["text"] for line in lines]
    places = [batch.where(n) for batch in batches for n in range(batch.num_records)]
    assert places == [f"{path}:{n + 1}" for n in range(500)]
    assert sum(batch.stored_bytes for batch in batches) == path.stat().st_size
    assert batches[-1].offset == sum(map(len, lines))


@pytest.mark.parametrize("ending", ENDINGS)
def test_reading_goes_on_at_any_border(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"c{ending}"
    path.write_bytes(packed(b"".join(some_lines(200)), ending))
    batches = read(path)
    for index, batch in enumerate(batches):
        rest = read(path, batch.offset)
        assert numbers(batches[: index + 1]) + numbers(rest) == [str(n) for n in range(200)]
        if rest:
            assert rest[0].where(0) == f"{path}:{len(numbers(batches[: index + 1])) + 1}"
            assert rest[-1].offset == batches[-1].offset


def test_a_line_belongs_to_the_stretch_in_which_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    lines = some_lines(30)
    path.write_bytes(b"".join(lines))
    size = path.stat().st_size
    for cut in [*range(0, 200), *range(200, size, 397), size]:
        parts = [(0, cut), (cut, size)]
        units = [Unit(str(path), "jsonl", begin, end, end - begin) for begin, end in parts]
        found = [list(read_lines(unit, ["text", "n"], 0, 1000)) for unit in units]
        assert numbers(found[0]) + numbers(found[1]) == [str(n) for n in range(30)]
        begins = [sum(map(len, lines[:n])) for n in range(30)]
        assert len(numbers(found[0])) == sum(begin < cut for begin in begins)
        if found[1]:
            assert found[1][0].where(0) == f"{path}:{len(numbers(found[0])) + 1}"


def test_texts_are_taken_by_key_and_may_be_lists(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        b'{"text": "one", "n": "1"}\n'
        b'{"n": "", "text": ["two", "three"], "other": 3}\r\n'
        b' {"text": "\\u00e9 \\ud83d\\ude42 \xc3\xa9", "n": []} \n'
    )
    [batch] = read(path)
    assert batch.texts["text"].texts == ["one", "two", "three", "é 🙂 é"]
    assert batch.texts["text"].counts == [1, 2, 1]
    assert batch.texts["n"].texts == ["1", ""]
    assert batch.texts["n"].counts == [1, 1, 0]
    assert [batch.texts["text"].document_of(text) for text in range(4)] == [0, 1, 1, 2]


def test_a_record_is_what_pythons_parser_makes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        b'{"text": "first", "n": "a", "text": "last"}\n'
        b'{"text": "kept", "n": "b", "score": NaN, "other": [Infinity, -Infinity, 1e999]}\n'
        b'{"text": "big", "n": "c", "id": 123456789012345678901234567890}\n'
    )
    [batch] = read(path)
    assert batch.texts["text"].texts == ["last", "kept", "big"]
    assert not batch.rejected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "blank line"),
        (b" \t\r", "blank line"),
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b'{"text": "a\x00b"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'\xef\xbb\xbf{"text": "a"}', "not JSON"),
        (b'["text"]', "a list where an object is needed"),
        (b'"text"', "a string where an object is needed"),
        (b"null", "null where an object is needed"),
        (b'{"txt": "a", "id": 1}', "no key 'text'; the line has ['id', 'txt']"),
        (b'{"text": null}', "'text' holds null where text is needed"),
        (b'{"text": 3}', "'text' holds a number"),
        (b'{"text": ["a", true]}', "'text' holds true or false"),
        (b'{"text": {"a": "b"}}', "'text' holds an object"),
        (b'{"text": "\xff"}', "byte 11 of the line is not UTF-8"),
        (b'{"text": "ab\\ud83d"}', "character 3 of 'text' is half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_its_fault_and_its_neighbours_are_kept(
    line: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(GOOD * 2 + line + b"\n" + GOOD)
    [unit] = find_units([str(path)])
    [batch] = read_lines(unit, ["text"], 0, 10**6)
    assert batch.num_records == 4
    assert batch.texts["text"].texts == ["good"] * 3
    [rejected] = batch.rejected.values()
    assert (rejected.where, rejected.raw) == (f"{path}:3", line)
    assert rejected.reason.startswith(reason)
    assert str(rejected.as_error()) == f"{path}:3: {rejected.reason}"
    assert [batch.where(document) for document in range(3)] == [f"{path}:{n}" for n in (1, 2, 4)]


@pytest.mark.parametrize(
    ("ending", "damage"), [(".gz", "cut"), (".gz", "other"), (".zst", "cut"), (".zst", "other")]
)
def test_a_damaged_file_is_refused(ending: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"c.jsonl{ending}"
    path.write_bytes(packed(GOOD * 1000, ending)[:-9] if damage == "cut" else GOOD)
    with pytest.raises(DataError, match=rf"c\.jsonl\{ending}:\d+: cannot be read"):
        read(path)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_of_nothing_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"c.jsonl{ending}"
    path.write_bytes(packed(b"", ending))
    with pytest.raises(DataError, match="is empty"):
        read(path)


def test_a_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(packed(GOOD * 10, ".gz"))
    with pytest.raises(DataError, match="ends 30 bytes before the place"):
        read(path, skip=len(GOOD) * 10 + 30)
