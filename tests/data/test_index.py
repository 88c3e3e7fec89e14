import hashlib
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mlr1.data.index import (
    DocumentBlock,
    IndexWriter,
    meta_path,
    open_corpus,
    token_dtype,
)
from megatron_mlr1.errors import ConfigError, DataError, MachineError

DOCUMENTS = [[[5, 6, 7]], [], [[8], [9, 10]], [[65499]]]
"""One sequence, none, two, one."""


def block(documents: list[list[list[int]]]) -> DocumentBlock:
    sequences = [sequence for document in documents for sequence in document]
    return DocumentBlock(
        tokens=np.array([token for sequence in sequences for token in sequence], np.int64),
        lengths=np.array([len(sequence) for sequence in sequences], np.int64),
        sequences=np.array([len(document) for document in documents], np.int64),
    )


def write(prefix: str, blocks: list[DocumentBlock], vocab_size: int = 65499) -> None:
    writer = IndexWriter(prefix, token_dtype(vocab_size))
    for part in blocks:
        writer.write(part)
    writer.seal()
    writer.publish()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    write(f"{tmp_path}/c", [block(DOCUMENTS)])

    assert (tmp_path / "c.bin").read_bytes() == struct.pack("<7H", 5, 6, 7, 8, 9, 10, 65499)
    assert (tmp_path / "c.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 4, 5)
        + struct.pack("<4i", 3, 1, 2, 1)
        + struct.pack("<4q", 0, 6, 8, 12)
        + struct.pack("<5q", 0, 1, 1, 3, 4)
    )


def test_bytes_do_not_depend_on_how_the_documents_were_cut_into_blocks(tmp_path: Path) -> None:
    write(f"{tmp_path}/whole", [block(DOCUMENTS)])
    write(f"{tmp_path}/cut", [block([document]) for document in DOCUMENTS] + [block([])])

    for kind in ("bin", "idx"):
        whole, cut = (tmp_path / f"{name}.{kind}" for name in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()


@pytest.mark.parametrize(("vocab_size", "name"), [(65499, "uint16"), (65500, "int32")])
def test_token_type_changes_at_65500_ids(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(name)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(f"{tmp_path}/a.b", [block(DOCUMENTS)], vocab_size=128256)
    corpus = open_corpus(f"{tmp_path}/a.b")

    assert (corpus.num_documents, corpus.num_tokens) == (4, 7)
    assert corpus.tokens.dtype == np.int32
    assert corpus.tokens.tolist() == [5, 6, 7, 8, 9, 10, 65499]
    assert corpus.lengths.tolist() == [3, 1, 2, 1]
    assert corpus.begins.tolist() == [0, 12, 16, 24]
    assert corpus.document_ends.tolist() == [0, 1, 1, 3, 4]


def test_nothing_has_its_final_name_before_it_is_published(tmp_path: Path) -> None:
    writer = IndexWriter(f"{tmp_path}/c", token_dtype(100))
    writer.write(block(DOCUMENTS[:1]))
    writer.seal()
    assert files(tmp_path) == [
        f"c.{kind}.partial" for kind in ("bin", "documents", "idx", "lengths")
    ]
    writer.publish()
    assert files(tmp_path) == ["c.bin", "c.idx"]
    writer.discard()
    assert files(tmp_path) == ["c.bin", "c.idx"]


@pytest.mark.parametrize("sealed", [False, True])
def test_discarding_leaves_nothing(sealed: bool, tmp_path: Path) -> None:
    writer = IndexWriter(f"{tmp_path}/c", token_dtype(100))
    writer.write(block(DOCUMENTS[:1]))
    if sealed:
        writer.seal()
    writer.discard()
    assert files(tmp_path) == []


def test_a_failed_rename_leaves_no_index(tmp_path: Path) -> None:
    writer = IndexWriter(f"{tmp_path}/c", token_dtype(100))
    writer.write(block(DOCUMENTS[:1]))
    writer.seal()
    (tmp_path / "c.idx.partial").unlink()
    with pytest.raises(MachineError, match=r"c\.bin"):
        writer.publish()
    writer.discard()
    assert files(tmp_path) == []


def test_a_record_goes_with_the_corpus_that_is_replaced(tmp_path: Path) -> None:
    write(f"{tmp_path}/c", [block(DOCUMENTS)])
    meta_path(f"{tmp_path}/c").touch()
    writer = IndexWriter(f"{tmp_path}/c", token_dtype(100), overwrite=True)
    writer.write(block(DOCUMENTS[:1]))
    writer.seal()
    assert files(tmp_path)[-2:] == ["c.lengths.partial", "c.meta.json"]
    writer.publish()
    assert files(tmp_path) == ["c.bin", "c.idx"]


def test_an_unfinished_corpus_goes_on_at_any_point_with_the_same_bytes(tmp_path: Path) -> None:
    write(f"{tmp_path}/whole", [block(DOCUMENTS)])
    for point in range(len(DOCUMENTS) + 1):
        prefix = f"{tmp_path}/{point}"
        first = IndexWriter(prefix, token_dtype(100))
        first.write(block(DOCUMENTS[:point]))
        counts = first.counts
        first.write(block(DOCUMENTS[::-1]))  # written after the point that is gone back to
        first.suspend()
        again = IndexWriter(prefix, token_dtype(100), resume=counts, hashed=True)
        again.write(block(DOCUMENTS[point:]))
        again.seal()
        again.publish()
        for kind in ("bin", "idx"):
            data = Path(f"{prefix}.{kind}").read_bytes()
            assert data == (tmp_path / f"whole.{kind}").read_bytes()
            assert hashlib.sha256(data).hexdigest() == again.sha256[kind]


def test_an_unfinished_corpus_that_is_too_short_is_kept_and_named(tmp_path: Path) -> None:
    writer = IndexWriter(f"{tmp_path}/c", token_dtype(100))
    writer.write(block(DOCUMENTS[:1]))
    counts = writer.counts
    writer.suspend()
    (tmp_path / "c.lengths.partial").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"c\.lengths\.partial has 3 bytes where 4 were written"):
        IndexWriter(f"{tmp_path}/c", token_dtype(100), resume=counts)
    assert len(files(tmp_path)) == 3


def test_tokens_of_one_document_may_come_in_parts(tmp_path: Path) -> None:
    write(f"{tmp_path}/whole", [block([[[1, 2, 3], [4]]])])
    writer = IndexWriter(f"{tmp_path}/parts", token_dtype(100))
    for part in ([1], [2, 3, 4]):
        writer.write_tokens(np.array(part))
    writer.write_documents(np.array([3, 1]), np.array([2]))
    writer.seal()
    writer.publish()
    for kind in ("bin", "idx"):
        whole, parts = (tmp_path / f"{name}.{kind}" for name in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from megatron_mlr1.data.index import DocumentBlock, IndexWriter\n"
        "writer = IndexWriter(sys.argv[1], np.dtype('<u2'))\n"
        "ones = np.ones(100_000, np.int64)\n"
        "for _ in range(int(sys.argv[2])): writer.write(DocumentBlock(ones, ones, ones))\n"
        "writer.seal()\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    peaks = []
    for blocks in (1, 60):
        words = [sys.executable, "-c", program, f"{tmp_path}/{blocks}", str(blocks)]
        run = subprocess.run(words, check=True, capture_output=True, text=True)
        peaks.append(int(run.stdout) * 1024)
    # The index of the second has 120 MB, its lengths and documents alone 72 MB.
    assert peaks[1] - peaks[0] < 10e6


@pytest.mark.parametrize("name", ["c.bin", "c.idx", "c.bin.partial", "c.lengths.partial"])
def test_what_exists_is_kept_unless_overwriting_is_wanted(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ConfigError, match="--overwrite"):
        IndexWriter(f"{tmp_path}/c", token_dtype(100))
    assert (tmp_path / name).read_bytes() == b"old"

    writer = IndexWriter(f"{tmp_path}/c", token_dtype(100), overwrite=True)
    writer.write(block(DOCUMENTS[:1]))
    writer.seal()
    writer.publish()
    assert open_corpus(f"{tmp_path}/c").tokens.tolist() == [5, 6, 7]


def test_a_missing_folder_and_a_file_as_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(
            MachineError, match=rf"/{folder}: No.* directory, so nothing can be written there"
        ):
            IndexWriter(f"{tmp_path}/{folder}/c", token_dtype(100))


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("idx", lambda data: data[:20], "20 bytes where the header alone has 34"),
        ("idx", lambda data: b"X" + data[1:], "begins with b'XMIDIDX"),
        ("idx", lambda data: _patched(data, 9, b"\x02"), "version 2"),
        ("idx", lambda data: _patched(data, 17, b"\x07"), "token type 7"),
        ("idx", lambda data: data[:-1], "has 121 bytes where its header makes 122"),
        ("idx", lambda data: data + b"\x00", "has 123 bytes"),
        ("idx", lambda data: _patched(data, 114, b"\x03"), "ends its documents at 3 of 4"),
        ("idx", lambda data: _patched(data, 18, b"\x00" * 8)[:74], "holds no tokens"),
        ("bin", lambda data: data[:-2], r"c\.bin has 12 bytes where its index makes 14"),
        ("bin", lambda data: b"", r"c\.bin has 0 bytes"),
    ],
)
def test_a_damaged_corpus_is_refused(kind: str, damage: Any, message: str, tmp_path: Path) -> None:
    write(f"{tmp_path}/c", [block(DOCUMENTS)])
    path = tmp_path / f"c.{kind}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        open_corpus(f"{tmp_path}/c")


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    write(f"{tmp_path}/c", [block(DOCUMENTS)])
    (tmp_path / f"c.{kind}").unlink()
    with pytest.raises(DataError, match=rf"c\.{kind}: No such file"):
        open_corpus(f"{tmp_path}/c")


def test_a_sequence_beyond_the_format_is_refused(tmp_path: Path) -> None:
    writer = IndexWriter(f"{tmp_path}/c", token_dtype(100))
    one = np.ones(1, np.int64)
    too_long = np.broadcast_to(np.uint16(1), (2**31,))
    with pytest.raises(DataError, match="2147483648 tokens"):
        writer.write(DocumentBlock(too_long, one * 2**31, one))
    writer.discard()
