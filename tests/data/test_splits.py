"""A part without documents is refused; the engine would count its epochs for ever."""

import numpy as np
import pytest

from megatron_mlr1.data.index import DocumentBlock, IndexWriter
from megatron_mlr1.data.splits import refuse_empty_parts
from megatron_mlr1.errors import DataError


@pytest.fixture
def corpus(tmp_path):
    prefix = str(tmp_path / "ten_text_document")
    writer = IndexWriter(prefix, np.dtype("<u2"))
    lengths, ones = np.full(10, 3), np.ones(10, np.int64)
    writer.write(DocumentBlock(np.arange(30), lengths, ones))
    writer.seal()
    writer.publish()
    return prefix


def test_parts_with_documents_pass(corpus):
    refuse_empty_parts([corpus], [(0.0, 0.9), (0.9, 1.0), None])


def test_a_part_without_a_document_is_named_with_its_corpus(corpus):
    with pytest.raises(DataError, match=r"ten_text_document has 10 .* none of them for validation"):
        refuse_empty_parts([corpus], [(0.0, 0.999), (0.999, 1.0), None])


def test_a_part_that_is_not_read_may_be_empty(corpus):
    refuse_empty_parts([corpus], [(0.0, 0.999), None, None])


def test_a_corpus_that_was_cut_short_is_refused(corpus, tmp_path):
    tokens = tmp_path / "ten_text_document.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match="ten_text_document"):
        refuse_empty_parts([corpus], [(0.0, 1.0), None, None])
