"""A run trains on the corpora that were made for it, and is told which were never shuffled."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mlr1.data.admission import RunTokenizer, admit, never_shuffled
from megatron_mlr1.data.index import DocumentBlock, IndexWriter
from megatron_mlr1.data.provenance import CorpusRecord, record_files, write_record
from megatron_mlr1.errors import DataError

TOKENIZER = RunTokenizer(name="mine", num_ids=300, eod=0, sha256="a" * 64, num_rows=384)
DESCRIBED = {"model": "theirs", "sha256": "a" * 64, "vocab_size": 300, "eod": 0}


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    prefix = str(tmp_path / "wiki_text_document")
    writer = IndexWriter(prefix, np.dtype("<u2"))
    writer.write(DocumentBlock(np.arange(200_000) % 300, np.array([200_000]), np.ones(1, int)))
    writer.seal()
    writer.publish()
    write_record(prefix, record(prefix))
    return prefix


def record(prefix: str) -> CorpusRecord:
    return CorpusRecord(
        kind="documents",
        files=record_files(prefix),
        tokenizer=DESCRIBED,
        append_eod=True,
        vocab_size=300,
        dtype="uint16",
        documents=1,
        sequences=1,
        tokens=200_000,
    )


def test_a_corpus_of_the_runs_tokenizer_is_admitted(prefix):
    admit(prefix, "quick", TOKENIZER)
    admit(prefix, "full", TOKENIZER)


def test_a_corpus_without_a_record_is_taken_as_it_is(prefix):
    Path(f"{prefix}.meta.json").unlink()
    admit(prefix, "full", replace(TOKENIZER, num_ids=1, num_rows=1))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sha256": "b" * 64}, "SHA-256"),
        ({"num_ids": 301}, "number of ids"),
        ({"eod": 2}, "end of document"),
    ],
)
def test_another_tokenizer_is_refused_with_both_named(prefix, change, named):
    with pytest.raises(DataError, match=f"wiki_text_document.*theirs.*mine.*{named}"):
        admit(prefix, "quick", replace(TOKENIZER, **change))


def test_a_tokenizer_whose_files_are_not_known_is_held_to_its_numbers(prefix):
    admit(prefix, "quick", replace(TOKENIZER, sha256=None))


def test_more_ids_than_rows_are_refused_with_the_corpus(prefix):
    with pytest.raises(DataError, match="wiki_text_document was made with a vocabulary of 300"):
        admit(prefix, "quick", replace(TOKENIZER, num_rows=256))


def test_the_quick_check_sees_a_file_cut_short_and_the_full_one_every_byte(prefix):
    path = Path(f"{prefix}.bin")
    tokens = path.read_bytes()
    path.write_bytes(tokens[:-2])
    with pytest.raises(DataError, match=r"wiki_text_document\.bin has 399998 bytes"):
        admit(prefix, "quick", TOKENIZER)
    path.write_bytes(tokens[:200_000] + b"\xff" + tokens[200_001:])
    admit(prefix, "quick", TOKENIZER)
    with pytest.raises(DataError, match=r"wiki_text_document\.bin has the SHA-256"):
        admit(prefix, "full", TOKENIZER)


def test_corpora_in_the_order_of_their_input_are_named(prefix, tmp_path):
    assert never_shuffled([prefix, str(tmp_path / "no_record")]) == (
        prefix,
        str(tmp_path / "no_record"),
    )
    write_record(prefix, replace(record(prefix), shuffled=5))
    assert never_shuffled([prefix]) == ()
    write_record(prefix, replace(record(prefix), kind="packs"))
    assert never_shuffled([prefix]) == ()


def test_packed_chats_whose_record_is_missing_are_not_taken_for_documents(prefix: str) -> None:
    Path(f"{prefix}.meta.json").unlink()
    admit(prefix, "quick", TOKENIZER)
    Path(f"{prefix}.loss.bin").write_bytes(bytes(200_000))
    with pytest.raises(DataError, match=r"loss\.bin .* record .* is missing"):
        admit(prefix, "quick", TOKENIZER)
