import hashlib
import os
from pathlib import Path

import pytest

from megatron_mlr1.data.check import BLOCK_TOKENS, check, checksums
from megatron_mlr1.errors import ConfigError, DataError
from tests.support.corpora import (
    MORE_THAN_A_BLOCK,
    patch,
    place,
    write_corpus,
    write_random_corpus,
)
from tests.support.records import write_record_of


def test_it_counts_what_a_sound_corpus_holds(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [3, 0, 2], [1, 0, 2])
    corpus = check(f"{tmp_path}/a")
    assert (corpus.num_documents, corpus.num_sequences, corpus.num_tokens) == (3, 3, 5)
    assert corpus.dtype.name == "uint16"


def test_a_wrong_begin_in_a_later_block_is_found(tmp_path: Path) -> None:
    write_random_corpus(tmp_path / "a", MORE_THAN_A_BLOCK, seed=0)
    check(f"{tmp_path}/a")
    at = MORE_THAN_A_BLOCK - 3
    patch(tmp_path / "a.idx", place("begin", at, MORE_THAN_A_BLOCK), "q", 12)
    with pytest.raises(DataError, match=rf"a\.idx begins sequence {at} at byte 12 where .* make"):
        check(f"{tmp_path}/a")


def test_documents_that_fall_between_two_blocks_are_found(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [1] * 300_000, [1] * 300_000)
    patch(tmp_path / "a.idx", place("end", 1 << 18, 300_000), "q", 5)
    with pytest.raises(DataError, match="ends document 262143 at 5, before its begin 262143"):
        check(f"{tmp_path}/a")


@pytest.mark.parametrize(("token", "at"), [(70_000, 3), (-1, BLOCK_TOKENS + 3)])
def test_an_id_outside_the_vocabulary_is_found(token: int, at: int, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [BLOCK_TOKENS + 10], [1], "<i4")
    check(f"{tmp_path}/a", vocab_size=60_000)
    patch(tmp_path / "a.bin", 4 * at, "i", token)
    check(f"{tmp_path}/a")
    with pytest.raises(DataError, match=rf"a\.bin: token {at} has the id {token}; .* 0 to 59999"):
        check(f"{tmp_path}/a", vocab_size=60_000)


def test_the_largest_id_is_below_the_vocabulary(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [1], [1])
    patch(tmp_path / "a.bin", 0, "H", 100)
    check(f"{tmp_path}/a", vocab_size=101)
    with pytest.raises(DataError, match="id 100"):
        check(f"{tmp_path}/a", vocab_size=100)
    with pytest.raises(ConfigError, match="--vocab-size is 0"):
        check(f"{tmp_path}/a", vocab_size=0)


def test_tokens_cut_short_and_no_tokens_are_found(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [3], [1])
    os.truncate(tmp_path / "a.bin", 5)
    with pytest.raises(DataError, match=r"a\.bin has 5 bytes where its index makes 6"):
        check(f"{tmp_path}/a")
    write_corpus(tmp_path / "b", [], [0])
    with pytest.raises(DataError, match="b holds no tokens"):
        check(f"{tmp_path}/b")


def test_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [3], [1])
    assert checksums(f"{tmp_path}/a") == {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "a.bin", tmp_path / "a.idx")
    }


def test_a_corpus_is_held_against_its_record(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [100_000], [1])
    write_record_of(f"{tmp_path}/a")
    check(f"{tmp_path}/a")
    checksums(f"{tmp_path}/a")
    patch(tmp_path / "a.bin", 100_000, "H", 60_001)
    check(f"{tmp_path}/a")
    with pytest.raises(DataError, match=r"a\.bin has the SHA-256"):
        checksums(f"{tmp_path}/a")
    patch(tmp_path / "a.bin", 0, "H", 60_001)
    with pytest.raises(DataError, match=r"a\.bin has other bytes at its begin"):
        check(f"{tmp_path}/a")
    write_record_of(f"{tmp_path}/a", tokens=7)
    with pytest.raises(DataError, match=r"a\.meta\.json says 7 tokens where .* holds 100000"):
        check(f"{tmp_path}/a")
