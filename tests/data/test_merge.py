import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_mlr1.data.index import CODES, HEADER, MAGIC, VERSION, open_corpus
from megatron_mlr1.data.merge import find_corpora, merge
from megatron_mlr1.data.provenance import read_record, verify
from megatron_mlr1.errors import ConfigError, DataError, MachineError
from tests.support.corpora import (
    MORE_THAN_A_BLOCK,
    contents,
    names,
    patch,
    place,
    write_corpus,
    write_random_corpus,
)
from tests.support.records import write_record_of


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Corpora a, b, c in the folder `in`; a has documents of one, no and two sequences."""
    (tmp_path / "in").mkdir()
    write_corpus(tmp_path / "in" / "a", [3, 1, 2], [1, 0, 2])
    write_corpus(tmp_path / "in" / "b", [4], [1])
    write_corpus(tmp_path / "in" / "c", [2, 0, 5], [3, 0])
    return [str(tmp_path / "in" / name) for name in "abc"]


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_bytes_are_those_of_the_engine(dtype: str, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefixes = [str(tmp_path / name) for name in ("large", "small", "one")]
    for seed, (prefix, size) in enumerate(zip(prefixes, (MORE_THAN_A_BLOCK, 7, 1), strict=True)):
        write_random_corpus(Path(prefix), size, seed, dtype)
    builder = IndexedDatasetBuilder(f"{tmp_path}/engine.bin", dtype=np.dtype(dtype).type)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{tmp_path}/engine.idx")

    written = merge(prefixes, f"{tmp_path}/ours")

    assert contents(tmp_path / "ours") == contents(tmp_path / "engine")
    assert written.num_tokens == open_corpus(f"{tmp_path}/ours").num_tokens
    assert written.num_documents == open_corpus(f"{tmp_path}/ours").num_documents


def test_corpora_keep_the_order_given(three: list[str], tmp_path: Path) -> None:
    merge(three[::-1], f"{tmp_path}/out")
    tokens = [open_corpus(prefix).tokens for prefix in three[::-1]]
    assert open_corpus(f"{tmp_path}/out").tokens.tolist() == np.concatenate(tokens).tolist()


def test_a_corpus_without_tokens_adds_its_documents(three: list[str], tmp_path: Path) -> None:
    write_corpus(tmp_path / "empty", [], [0, 0])
    merge([three[0], f"{tmp_path}/empty", three[1]], f"{tmp_path}/out")
    assert open_corpus(f"{tmp_path}/out").document_ends.tolist() == [0, 1, 1, 3, 3, 3, 4]
    with pytest.raises(DataError, match="hold no tokens"):
        merge([f"{tmp_path}/empty"], f"{tmp_path}/none")


def test_wrong_begins_of_an_input_come_out_right(three: list[str], tmp_path: Path) -> None:
    merge(three, f"{tmp_path}/right")
    patch(Path(f"{three[0]}.idx"), place("begin", 1, 3), "q", -7, 2**40)
    merge(three, f"{tmp_path}/out")
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


def test_memory_does_not_grow_with_the_index(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from megatron_mlr1.data.merge import merge\n"
        "merge([sys.argv[1]], sys.argv[1] + '-out')\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    peaks = []
    for num_sequences in (1_000, 6_000_000):
        prefix = f"{tmp_path}/{num_sequences}"
        lengths, ends = np.zeros(num_sequences, "<i4"), np.arange(num_sequences + 1)
        lengths[0] = 1
        begins = np.minimum(ends[:-1], 1) * 2
        header = HEADER.pack(MAGIC, VERSION, CODES[np.dtype("<u2")], num_sequences, ends.size)
        Path(f"{prefix}.bin").write_bytes(bytes(2))
        parts = (lengths, begins, ends)
        Path(f"{prefix}.idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
        run = subprocess.run(
            [sys.executable, "-c", program, prefix], check=True, capture_output=True, text=True
        )
        peaks.append(int(run.stdout) * 1024)
    # The index of the second has 120 MB.
    assert peaks[1] - peaks[0] < 25e6


def damage(three: list[str], kind: str) -> None:
    index, tokens = Path(f"{three[0]}.idx"), Path(f"{three[0]}.bin")
    match kind:
        case "short tokens":
            os.truncate(tokens, 10)
        case "long tokens":
            os.truncate(tokens, 14)
        case "short index":
            os.truncate(index, index.stat().st_size - 1)
        case "modes":
            os.truncate(index, index.stat().st_size + 3)
        case "negative length":
            patch(index, place("length", 1, 3), "i", -1)
        case "falling documents":
            patch(index, place("end", 0, 3), "q", 0, 3, 1, 3)
        case "documents after 0":
            patch(index, place("end", 0, 3), "q", 1)
        case "documents beyond":
            patch(index, place("end", 3, 3), "q", 4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short tokens", r"in/a\.bin has 10 bytes where its index makes 12"),
        ("long tokens", r"in/a\.bin has 14 bytes where its index makes 12"),
        ("short index", r"in/a\.idx has 101 bytes where its header makes 102"),
        ("modes", r"in/a\.idx has modes .* multimodal"),
        ("negative length", r"in/a\.idx gives sequence 1 the length -1"),
        ("falling documents", r"in/a\.idx ends document 1 at 1, before its begin 3"),
        ("documents after 0", r"in/a\.idx begins its documents at sequence 1"),
        ("documents beyond", r"in/a\.idx ends its documents at 4 of 3"),
    ],
)
def test_a_damaged_input_is_refused_and_nothing_is_written(
    kind: str, message: str, three: list[str], tmp_path: Path
) -> None:
    damage(three, kind)
    with pytest.raises(DataError, match=message):
        merge(three, f"{tmp_path}/out")
    assert names(tmp_path) == ["in"]


def test_other_token_types_are_refused(three: list[str], tmp_path: Path) -> None:
    write_corpus(tmp_path / "in" / "d", [1], [1], "<i4")
    with pytest.raises(DataError, match=r"in/d holds int32 and .*in/a uint16.*same tokenizer"):
        merge([*three, f"{tmp_path}/in/d"], f"{tmp_path}/out")


def test_an_input_is_never_the_output(three: list[str], tmp_path: Path) -> None:
    before = contents(Path(three[0]))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"link/a\.bin is read and would be written"):
        merge(three, f"{tmp_path}/link/a", overwrite=True)
    assert contents(Path(three[0])) == before


def test_what_exists_is_kept_unless_overwriting_is_wanted(three: list[str], tmp_path: Path) -> None:
    merge(three[:1], f"{tmp_path}/out")
    with pytest.raises(ConfigError, match="--overwrite"):
        merge(three, f"{tmp_path}/out")
    assert contents(tmp_path / "out") == contents(Path(three[0]))
    merge(three, f"{tmp_path}/out", overwrite=True)
    assert open_corpus(f"{tmp_path}/out").num_tokens == 6 + 4 + 7


def test_more_than_the_disk_holds_is_refused_at_once(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [1] * 4000, [1] * 4000)
    patch(tmp_path / "a.idx", place("length", 0, 4000), "i", *[2**31 - 1] * 4000)
    try:
        os.truncate(tmp_path / "a.bin", 4000 * (2**31 - 1) * 2)
    except OSError:
        pytest.skip("this file system has no sparse files of 17 TB")
    with pytest.raises(MachineError, match=r"and 17\.18 TB are to be written"):
        merge([f"{tmp_path}/a"], f"{tmp_path}/out")
    assert names(tmp_path) == ["a.bin", "a.idx"]


def test_a_folder_stands_for_its_corpora_by_name(three: list[str], tmp_path: Path) -> None:
    (tmp_path / "in" / "a.meta.json").touch()
    write_corpus(tmp_path / "x.y", [1], [1])
    assert find_corpora([f"{tmp_path}/x.y", f"{tmp_path}/in"]) == [f"{tmp_path}/x.y", *three]


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (["missing"], DataError, r"missing\.bin is not there"),
        (["in/a.bin"], DataError, r"a\.bin\.bin is not there.* without \.bin"),
        (["half"], DataError, r"half/a\.idx is not there"),
        (["empty"], DataError, "empty holds no corpus"),
        (["unfinished"], DataError, r"unfinished/b\.bin\.partial is not finished"),
        (["in", "in/b"], ConfigError, "in/b and .*in/b are the same corpus"),
        (["both"], ConfigError, "both/ for the folder"),
    ],
)
def test_inputs_that_are_none_are_refused(
    given: list[str], kind: type[Exception], message: str, three: list[str], tmp_path: Path
) -> None:
    for folder in ("half", "empty", "unfinished", "both"):
        (tmp_path / folder).mkdir()
    (tmp_path / "half" / "a.bin").touch()
    (tmp_path / "unfinished" / "b.bin.partial").touch()
    write_corpus(tmp_path / "both", [1], [1])
    with pytest.raises(kind, match=message):
        find_corpora([f"{tmp_path}/{name}" for name in given])


def test_records_are_joined_with_their_corpora(three: list[str], tmp_path: Path) -> None:
    for number, prefix in enumerate(three):
        write_record_of(prefix, rejected=number, shuffled=1, shard=(number, 3), plan="abc")
    merge(three, f"{tmp_path}/out")
    record = read_record(f"{tmp_path}/out")
    assert record is not None
    verify(f"{tmp_path}/out", record, "full")
    assert (record.documents, record.sequences, record.tokens) == (6, 7, 17)
    assert (record.rejected, record.shuffled, record.shard, record.plan) == (3, None, None, None)
    assert [one["path"] for one in record.inputs] == [f"{prefix}.jsonl" for prefix in three]


def test_one_corpus_alone_keeps_what_its_record_says(three: list[str], tmp_path: Path) -> None:
    before = write_record_of(three[0], shuffled=4, tail_fraction=1 / 32, plan="abc")
    merge(three[:1], f"{tmp_path}/out")
    assert read_record(f"{tmp_path}/out") == before


def test_a_corpus_without_a_record_makes_one_without(three: list[str], tmp_path: Path) -> None:
    write_record_of(three[0])
    merge(three[:1], f"{tmp_path}/out")
    merge(three, f"{tmp_path}/out", overwrite=True)
    assert names(tmp_path) == ["in", "out.bin", "out.idx"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer": {"type": "ByteLevelTokenizer", "sha256": "1"}}, "in/c .*another tokenizer"),
        ({"append_eod": True}, "in/c .*another --append-eod .True. than .*in/a .False."),
        ({"kind": "packs"}, "in/c holds packed samples"),
    ],
)
def test_corpora_of_other_makers_are_refused(
    fields: dict[str, object], message: str, three: list[str], tmp_path: Path
) -> None:
    write_record_of(three[0])
    write_record_of(three[2], **fields)
    with pytest.raises((DataError, ConfigError), match=message):
        merge(three, f"{tmp_path}/out")
    assert names(tmp_path) == ["in"]


def test_an_input_that_names_nothing_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names nothing"):
        find_corpora([""])
    with pytest.raises(DataError, match="File name too long"):
        find_corpora(["n" * 300])
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(DataError, match=r"a\.bin is no file"):
        find_corpora([f"{tmp_path}/a"])


def test_a_folder_in_place_of_an_output_is_refused(three: list[str], tmp_path: Path) -> None:
    (tmp_path / "out.bin").mkdir()
    with pytest.raises(ConfigError, match=r"out\.bin is a folder"):
        merge(three, f"{tmp_path}/out", overwrite=True)
    with pytest.raises(ConfigError, match="names no file"):
        merge(three, f"{tmp_path}/")
