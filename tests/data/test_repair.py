import os
from pathlib import Path

import pytest

from megatron_mlr1.data.check import check
from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.provenance import read_record, verify
from megatron_mlr1.data.repair import RepairPlan, repair
from megatron_mlr1.errors import ConfigError, DataError
from tests.support.corpora import contents, names, patch, place, write_corpus
from tests.support.records import write_record_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus `a` of 5 sequences in 5 documents."""
    write_corpus(tmp_path / "a", [3, 1, 2, 4, 2], [1, 0, 2, 1, 1])
    return tmp_path


def plan(folder: Path, **leave: bool) -> RepairPlan:
    return RepairPlan(input_prefix=f"{folder}/a", output_prefix=f"{folder}/out", **leave)


def test_wrong_begins_are_mended_and_the_damaged_files_stay(folder: Path) -> None:
    sound = contents(folder / "a")
    patch(folder / "a.idx", place("begin", 2, 5), "q", 0, -1)
    damaged = contents(folder / "a")
    written, num_lost = repair(plan(folder))
    assert (written.num_documents, written.num_tokens, num_lost) == (5, 12, 0)
    assert contents(folder / "out") == sound
    assert contents(folder / "a") == damaged


def test_a_wrong_number_of_documents_is_mended(folder: Path) -> None:
    sound = contents(folder / "a")
    patch(folder / "a.idx", 26, "Q", 99)
    assert repair(plan(folder))[1] == 0
    assert contents(folder / "out") == sound


@pytest.mark.parametrize(
    ("num_bytes", "num_documents", "num_tokens"), [(23, 4, 10), (20, 4, 10), (19, 3, 6), (9, 2, 3)]
)
def test_tokens_cut_short_lose_the_documents_that_are_not_whole(
    num_bytes: int, num_documents: int, num_tokens: int, folder: Path
) -> None:
    tokens = open_corpus(f"{folder}/a").tokens.tolist()
    os.truncate(folder / "a.bin", num_bytes)
    with pytest.raises(DataError, match=rf"{num_bytes} bytes where its index makes 24.*--truncate"):
        repair(plan(folder))
    assert names(folder) == ["a.bin", "a.idx"]
    written, num_lost = repair(plan(folder, truncate=True))
    assert (written.num_documents, written.num_tokens) == (num_documents, num_tokens)
    assert num_lost == 5 - num_documents
    check(f"{folder}/out")
    assert open_corpus(f"{folder}/out").tokens.tolist() == tokens[:num_tokens]


def test_bytes_that_belong_to_no_document_are_left_out(folder: Path) -> None:
    sound = contents(folder / "a")
    os.truncate(folder / "a.bin", 31)
    assert repair(plan(folder, truncate=True))[1] == 0
    assert contents(folder / "out") == sound


@pytest.mark.parametrize("kind", ["wrong", "cut"])
def test_lost_borders_of_documents_are_replaced_only_on_demand(kind: str, folder: Path) -> None:
    if kind == "wrong":
        patch(folder / "a.idx", place("end", 1, 5), "q", 3, 2)
    else:
        os.truncate(folder / "a.idx", place("begin", 1, 5))
    with pytest.raises(DataError, match="--sequences-as-documents can"):
        repair(plan(folder))
    assert names(folder) == ["a.bin", "a.idx"]
    repair(plan(folder, sequences_as_documents=True))
    corpus = open_corpus(f"{folder}/out")
    assert corpus.lengths.tolist() == [3, 1, 2, 4, 2]
    assert corpus.document_ends.tolist() == [0, 1, 2, 3, 4, 5]
    check(f"{folder}/out")


def test_what_cannot_be_mended_is_refused(folder: Path) -> None:
    os.truncate(folder / "a.bin", 5)
    with pytest.raises(DataError, match="no whole document"):
        repair(plan(folder, truncate=True))
    patch(folder / "a.idx", place("length", 4, 5), "i", -2)
    with pytest.raises(DataError, match=r"sequence 4 the length -2\. Nothing can mend it"):
        repair(plan(folder, truncate=True, sequences_as_documents=True))
    os.truncate(folder / "a.idx", place("length", 4, 5))
    with pytest.raises(DataError, match="lengths are lost"):
        repair(plan(folder, truncate=True, sequences_as_documents=True))
    assert names(folder) == ["a.bin", "a.idx"]


def test_a_sound_corpus_and_a_repair_in_place_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="a has no fault"):
        repair(plan(folder))
    patch(folder / "a.idx", place("begin", 1, 5), "q", 0)
    in_place = RepairPlan(input_prefix=f"{folder}/a", output_prefix=f"{folder}/a", overwrite=True)
    with pytest.raises(ConfigError, match="never changed in place"):
        repair(in_place)


def test_a_mended_corpus_has_a_record_of_what_is_left(folder: Path) -> None:
    write_record_of(f"{folder}/a", plan="abc")
    os.truncate(folder / "a.bin", 19)
    repair(plan(folder, truncate=True))
    record = read_record(f"{folder}/out")
    assert record is not None
    verify(f"{folder}/out", record, "full")
    assert (record.documents, record.sequences, record.tokens, record.plan) == (3, 3, 6, None)


def test_packs_are_not_repaired(folder: Path) -> None:
    write_record_of(f"{folder}/a", kind="packs")
    with pytest.raises(ConfigError, match=r"packed samples.*tools/repair_data\.py"):
        repair(plan(folder))
