"""Samples are runs of the corpus's own tokens; what is none is refused with the file's name."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_mlr1.data.index import DocumentBlock, IndexWriter
from megatron_mlr1.data.rows import Rows
from megatron_mlr1.data.sampler import Places
from megatron_mlr1.data.streams import part_of
from megatron_mlr1.data.token_source import TokenReader, TokenSource, refuse_without_ends
from megatron_mlr1.errors import DataError

END, LENGTH, KEY = 0, 8, 1234


def write(prefix: Path, documents, dtype="<u2"):
    writer = IndexWriter(str(prefix), np.dtype(dtype))
    lengths = np.array([len(document) for document in documents])
    tokens = np.concatenate([np.array(document, int) for document in documents])
    writer.write(DocumentBlock(tokens, lengths, np.ones(lengths.size, np.int64)))
    writer.seal()
    writer.publish()
    return str(prefix)


def source(prefix, *, share=(0.0, 1.0)):
    return TokenSource(part_of(prefix, *share), LENGTH, KEY)


def reader(*sources, end=None, num_ids=60_000):
    return TokenReader(sources, LENGTH, end=end, num_ids=num_ids)


def places(*samples):
    """Stream, epoch and item of each."""
    stream, epoch, item = np.array(samples).T
    return Places(stream=stream.astype(np.int32), epoch=epoch, item=item)


def read(reader, *samples):
    rows = Rows(len(samples), LENGTH)
    reader.plan(places(*samples)).fill(rows, 0)
    return rows


@pytest.fixture(params=["<u2", "<i4"])
def prefix(tmp_path, request):
    """Forty documents of nine tokens, each token another, and an end."""
    ids = np.arange(1, 361).reshape(40, 9).tolist()
    return write(tmp_path / "c_text_document", [[*row, END] for row in ids], request.param)


def test_a_sample_is_a_run_of_the_ring_and_an_epoch_has_every_token_once(prefix):
    ring = np.fromfile(f"{prefix}.bin", part_of(prefix, 0, 1).dtype).tolist()
    samples = source(prefix)
    assert samples.num_items == 400 // LENGTH
    for epoch in range(3):
        seen = Counter()
        for item in range(samples.num_items):
            rows = read(reader(samples), (0, epoch, item))
            text = [*rows.tokens[0].tolist(), rows.labels[0, -1].item()]
            assert rows.labels[0, :-1].tolist() == text[1:-1]
            twice = ring + ring
            # Ends apart all tokens differ, so a run is found by any other token of it.
            place = ring.index(next(token for token in text if token != END))
            begin = (place - next(i for i, t in enumerate(text) if t != END)) % len(ring)
            assert twice[begin : begin + LENGTH + 1] == text
            seen.update(text[:-1])
        assert seen == Counter(ring)


def test_epochs_are_cut_at_other_places(prefix):
    first, second = read(reader(source(prefix)), (0, 0, 0), (0, 1, 0)).tokens.tolist()
    assert first != second


def test_the_rows_of_a_batch_come_from_their_own_corpora(tmp_path, prefix):
    other = write(tmp_path / "other", [list(range(1001, 1017))], "<i8")
    samples = [(1, 0, 0), (0, 3, 7), (1, 0, 1), (0, 0, 0)]
    both = reader(source(prefix), source(other))
    rows = read(both, *samples)
    for row, sample in enumerate(samples):
        assert read(both, sample).tokens[0].equal(rows.tokens[row])
        assert (rows.tokens[row] > 1000).all() == (sample[0] == 1)


def test_a_plan_is_read_from_any_sample_on(prefix):
    samples = [(0, 0, item) for item in range(9)]
    plan = reader(source(prefix)).plan(places(*samples))
    rows = Rows(3, LENGTH)
    plan.fill(rows, 4)
    assert rows.tokens.equal(read(reader(source(prefix)), *samples[4:7]).tokens)


def test_a_part_has_its_own_documents_alone(prefix):
    tokens = set()
    valid = source(prefix, share=(0.9, 1.0))
    for item in range(valid.num_items):
        tokens |= set(read(reader(valid), (0, 0, item)).tokens[0].tolist())
    assert tokens == {END, *range(325, 361)}


def test_a_ring_shorter_than_a_sample_and_its_label_goes_round(tmp_path):
    prefix = write(tmp_path / "c", [list(range(1, LENGTH + 1))])
    rows = read(reader(source(prefix)), (0, 0, 0))
    assert sorted(rows.tokens[0].tolist()) == list(range(1, LENGTH + 1))
    assert rows.labels[0, -1] == rows.tokens[0, 0]


def test_the_loss_never_spans_a_boundary_where_documents_are_kept_apart(prefix):
    samples = source(prefix)
    apart = reader(samples, end=END)
    assert apart.keeps_documents_apart
    for item in range(samples.num_items):
        rows = read(apart, (0, 0, item))
        document = np.cumsum(rows.position_ids[0].numpy() == 0)
        for place in range(LENGTH - 1):
            same = document[place] == document[place + 1]
            assert rows.loss_mask[0, place] == float(same)
        assert (rows.loss_mask[0] == 0).tolist() == (rows.tokens[0] == END).tolist()


def test_an_id_that_the_model_has_no_row_for_is_named_with_the_file(prefix):
    samples = source(prefix)
    with pytest.raises(DataError, match=r"c_text_document\.bin holds the id 3\d\d.* 0 to 299"):
        read(reader(samples, num_ids=300), *((0, 0, item) for item in range(samples.num_items)))


def test_a_file_cut_short_during_the_run_is_named(prefix):
    samples = source(prefix)
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"c_text_document\.bin ends before token"):
        read(reader(samples), *((0, 0, item) for item in range(samples.num_items)))


def test_a_file_that_cannot_be_read_is_named_with_the_systems_reason(prefix):
    samples = reader(source(prefix))
    number = samples.plan(places((0, 0, 0))).runs[0, 0].item()
    folder = os.open(Path(prefix).parent, os.O_RDONLY)
    os.dup2(folder, number)
    os.close(folder)
    with pytest.raises(DataError, match=r"c_text_document\.bin cannot be read \(Is a directory\)"):
        read(samples, (0, 0, 0))


def test_a_corpus_without_ends_cannot_be_kept_apart(tmp_path, prefix):
    without = write(tmp_path / "without", [[1, 2, 3]] * 4)
    refuse_without_ends(prefix, END, appended=None)
    refuse_without_ends(without, END, appended=True)
    for appended in (None, False):
        with pytest.raises(DataError, match="without: its documents do not end"):
            refuse_without_ends(without, END, appended=appended)


def test_empty_documents_say_nothing_of_ends(tmp_path):
    writer = IndexWriter(str(tmp_path / "c"), np.dtype("<u2"))
    lengths, sequences = np.array([3, 2]), np.array([0, 1, 0, 1])
    writer.write(DocumentBlock(np.array([5, 6, END, 7, END]), lengths, sequences))
    writer.seal()
    writer.publish()
    refuse_without_ends(str(tmp_path / "c"), END, appended=None)
