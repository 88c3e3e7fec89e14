from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mlr1.data.encode import EncodedBatch, Position, Rejected
from megatron_mlr1.data.encoding import Encoding
from megatron_mlr1.data.index import DocumentBlock, IndexWriter
from megatron_mlr1.data.journal import Journal, read_journal
from megatron_mlr1.data.quarantine import Quarantine
from megatron_mlr1.errors import DataError

BATCH = EncodedBatch(
    blocks={"text": DocumentBlock(np.array([5, 6, 7], "<u2"), np.array([1, 2]), np.array([1, 1]))},
    rejected=(Rejected("a:3", "bad", b"x"),),
    num_records=3,
    stored_bytes=30,
    end=Position(0, 30),
    engine="bytes",
)


@pytest.fixture
def encoding(tmp_path: Path) -> Encoding:
    prefix = f"{tmp_path}/c"
    writer = IndexWriter(f"{prefix}_text_document", np.dtype("<u2"))
    return Encoding(prefix, Journal(plan={}), {"text": writer}, Quarantine(prefix, 0))


def test_the_journal_tells_what_lies_on_the_disk(encoding: Encoding, tmp_path: Path) -> None:
    encoding.accept(BATCH)
    encoding.write_journal()
    encoding.accept(BATCH)
    encoding.close()
    journal = read_journal(f"{tmp_path}/c")
    assert journal is not None
    assert journal == encoding.journaled
    assert (journal.records, journal.rejected, journal.stored_bytes) == (3, 1, 30)
    assert (journal.position, journal.engine) == ({"unit": 0, "offset": 30}, "bytes")
    counts = journal.counts["text"]
    assert (counts.tokens, counts.sequences, counts.documents) == (3, 2, 2)
    assert (tmp_path / "c_text_document.bin.partial").stat().st_size >= 6
    assert (tmp_path / "c_text_document.lengths.partial").stat().st_size >= 8
    assert (tmp_path / "c.rejected.jsonl.partial").stat().st_size >= journal.rejected_bytes


def test_a_journal_is_due_after_so_many_bytes_or_seconds(encoding: Encoding) -> None:
    assert not encoding.is_due(every_bytes=6, every_s=1000)
    assert encoding.is_due(every_bytes=6, every_s=0)
    encoding.accept(BATCH)
    assert encoding.is_due(every_bytes=6, every_s=1000)
    encoding.write_journal()
    assert not encoding.is_due(every_bytes=6, every_s=1000)
    encoding.close()


@pytest.mark.parametrize("wrong", [{"num_records": 4}, {"rejected": ()}, {"num_records": 2}])
def test_a_batch_that_lost_records_is_refused(wrong: dict[str, object], encoding: Encoding) -> None:
    with pytest.raises(DataError, match="records were read, but 2 documents and"):
        encoding.accept(replace(BATCH, **wrong))  # type: ignore[arg-type]
    encoding.close()


def test_a_run_that_lost_documents_is_refused_at_its_end(encoding: Encoding) -> None:
    encoding.accept(BATCH)
    encoding.now = replace(encoding.now, records=4)
    with pytest.raises(DataError, match="4 records were read, but 2 documents and 1 rejected"):
        encoding.seal()
    encoding.close()
