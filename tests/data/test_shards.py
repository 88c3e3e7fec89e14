from pathlib import Path
from typing import Any

import pytest

from megatron_mlr1.data.check import check
from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.merge import find_corpora, merge
from megatron_mlr1.data.mixture import resolve
from megatron_mlr1.data.provenance import read_record, verify
from megatron_mlr1.data.shards import SplitPlan, split
from megatron_mlr1.errors import ConfigError, DataError
from megatron_mlr1.recipes import Corpus, Mixture
from tests.support.corpora import (
    MORE_THAN_A_BLOCK,
    contents,
    names,
    write_corpus,
    write_random_corpus,
)
from tests.support.records import write_record_of


def plan(folder: Path, **size: Any) -> SplitPlan:
    return SplitPlan(input_prefix=f"{folder}/a", output_prefix=f"{folder}/out/s", **size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "size", [{"num_shards": 1}, {"num_shards": 7}, {"max_tokens": 400_000}], ids=str
)
def test_shards_are_sound_and_merge_to_the_same_bytes(size: dict[str, int], folder: Path) -> None:
    write_random_corpus(folder / "a", MORE_THAN_A_BLOCK, seed=1)
    shards = split(plan(folder, **size))
    for shard in shards:
        checked = check(shard.prefix, vocab_size=60_000)
        assert (checked.num_documents, checked.num_tokens) == (
            shard.num_documents,
            shard.num_tokens,
        )
    merge(find_corpora([f"{folder}/out"]), f"{folder}/again")
    assert contents(folder / "again") == contents(folder / "a")


def test_shards_have_equal_tokens_but_for_a_document(folder: Path) -> None:
    write_random_corpus(folder / "a", MORE_THAN_A_BLOCK, seed=1)
    tokens = [shard.num_tokens for shard in split(plan(folder, num_shards=9))]
    assert len(tokens) == 9
    assert max(tokens) - min(tokens) <= 2 * 18  # a document has at most 2 sequences of 9


def test_a_limit_is_filled_and_never_passed(folder: Path) -> None:
    write_corpus(folder / "a", [3, 4, 1, 2, 2, 7, 7, 1], [1, 2, 0, 1, 1, 1, 1, 0, 1])
    split(plan(folder, max_tokens=8))
    shards = [open_corpus(prefix) for prefix in find_corpora([f"{folder}/out"])]
    assert [shard.lengths.tolist() for shard in shards] == [[3, 4, 1], [2, 2], [7], [7, 1]]
    assert [shard.document_ends.tolist() for shard in shards] == [
        *([0, 1, 3, 3], [0, 1, 2], [0, 1], [0, 1, 1, 2])
    ]


def test_a_mixture_finds_the_shards_in_their_folder(folder: Path) -> None:
    write_corpus(folder / "a", [3, 3, 3], [1, 1, 1])
    shards = split(plan(folder, num_shards=3))
    corpus = Corpus(name="out", weight=1.0, dataset="any", source="none")
    mixture = Mixture(name="one", about="one corpus", corpora=(corpus,))
    assert [str(corpus.prefix) for corpus in resolve(mixture, folder)] == [
        shard.prefix for shard in shards
    ]


def test_documents_too_long_for_the_shards_are_refused(folder: Path) -> None:
    write_corpus(folder / "a", [1, 1, 1, 100], [1, 1, 1, 1])
    with pytest.raises(DataError, match=r"103 tokens in 4 documents.* fewer --num-shards"):
        split(plan(folder, num_shards=3))
    with pytest.raises(DataError, match=r"a: document 3 has 100 tokens, more than --max-tokens 99"):
        split(plan(folder, max_tokens=99))
    assert names(folder / "out") == []
    assert [shard.num_tokens for shard in split(plan(folder, max_tokens=100))] == [3, 100]


def test_shards_of_another_split_are_refused(folder: Path) -> None:
    write_corpus(folder / "a", [1, 1, 1], [1, 1, 1])
    split(plan(folder, num_shards=3))
    with pytest.raises(ConfigError, match=r"s_00002_text_document\.bin is left from another split"):
        split(plan(folder, num_shards=2, overwrite=True))
    for path in (folder / "out").glob("s_00002*"):
        path.unlink()
    with pytest.raises(ConfigError, match="--overwrite"):
        split(plan(folder, num_shards=2))
    assert len(split(plan(folder, num_shards=2, overwrite=True))) == 2


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({}, "either --num-shards or --max-tokens"),
        ({"num_shards": 2, "max_tokens": 2}, "either --num-shards or --max-tokens"),
        ({"num_shards": 0}, "--num-shards is 0"),
        ({"num_shards": 100_000}, "1 to 99999"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(
    size: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, **size)


def test_each_shard_says_of_what_it_is_a_part(folder: Path) -> None:
    write_corpus(folder / "a", [3, 3, 3], [1, 1, 1])
    whole = write_record_of(f"{folder}/a", rejected=2, shuffled=1, tail_fraction=1 / 32, plan="abc")
    for number, shard in enumerate(split(plan(folder, num_shards=3))):
        record = read_record(shard.prefix)
        assert record is not None
        verify(shard.prefix, record, "full")
        assert record.part_of == {
            "sha256": whole.files["bin"].sha256,
            "first_document": number,
        }
        assert (record.documents, record.tokens, record.rejected) == (1, 3, 0)
        assert (record.shuffled, record.tail_fraction, record.plan) == (1, None, None)


def test_packs_are_not_split(folder: Path) -> None:
    write_corpus(folder / "a", [3, 3, 3], [1, 1, 1])
    write_record_of(f"{folder}/a", kind="packs")
    with pytest.raises(ConfigError, match=r"packed samples.*tools/split_data\.py"):
        split(plan(folder, num_shards=3))
