"""Corpora become numbered samples: shares, phases and counts, and what may not be mixed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_mlr1.data.feed import BLOCK, Reading, open_feed
from megatron_mlr1.data.index import DocumentBlock, IndexWriter
from megatron_mlr1.data.mixture import Blend, ResolvedCorpus
from megatron_mlr1.data.rows import Rows
from megatron_mlr1.errors import DataError

LENGTH, END = 8, 0
ALL = (0.0, 1.0)
# Each corpus has ids of its own, so that a sample tells where it came from.
FIRST_ID = {"wiki": 1000, "code": 2000, "maths": 3000}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, first in FIRST_ID.items():
        writer = IndexWriter(str(tmp_path / f"{name}_text_document"), np.dtype("<u2"))
        lengths = np.full(30, 20)
        tokens = first + np.arange(600)
        tokens[19::20] = END
        writer.write(DocumentBlock(tokens, lengths, np.ones(30, np.int64)))
        writer.seal()
        writer.publish()
    return tmp_path


def blend(root: Path, first_sample: int = 0, **weights: float) -> Blend:
    corpora = (
        ResolvedCorpus(name=name, weight=weight, prefix=root / f"{name}_text_document")
        for name, weight in weights.items()
    )
    return Blend(first_sample=first_sample, corpora=tuple(corpora))


def reading(seed: int = 1, end: int | None = None, length: int = LENGTH) -> Reading:
    return Reading(seq_length=length, seed=seed, end=end, num_ids=60_000)


def tokens(feed, first: int, count: int) -> list[list[int]]:
    rows = Rows(count, LENGTH)
    feed.fill(rows, first)
    return rows.tokens.tolist()


def corpus_of(sample: list[int]) -> str:
    thousand = max(sample) // 1000 * 1000
    return next(name for name, first in FIRST_ID.items() if first == thousand)


def counted(feed, count: int) -> Counter[str]:
    return Counter(map(corpus_of, tokens(feed, 0, count)))


def test_samples_are_shared_out_by_weight_and_counted_as_they_are_read(root):
    feed = open_feed([blend(root, wiki=0.75, code=0.25)], ALL, reading())
    for count in (1, 40, 400):
        read = counted(feed, count)
        assert feed.samples(count) == {"wiki": read["wiki"], "code": read["code"]}
    assert read["wiki"] == pytest.approx(300, abs=2)


def test_any_cut_into_micro_batches_reads_the_same_samples(root):
    feed = open_feed([blend(root, wiki=0.5, code=0.5)], ALL, reading())
    whole = tokens(feed, 0, 60)
    assert [row for first in range(0, 60, 5) for row in tokens(feed, first, 5)] == whole


def test_far_micro_batches_and_steps_back_read_the_same_samples(root):
    blends = [blend(root, wiki=0.5, code=0.5), blend(root, 5000, wiki=1.0)]
    feed = open_feed(blends, ALL, reading())
    # Near ones are looked up in blocks: within one, over its end, far beyond it, and back.
    firsts = [0, 4, 8, BLOCK - 4, BLOCK, BLOCK + 2, 4998, 5002, 10 * BLOCK, 3, 7, BLOCK + 5]
    for first in firsts:
        alone = open_feed(blends, ALL, reading())
        assert tokens(feed, first, 4) == tokens(alone, first, 4), first


def test_micro_batches_wider_than_a_block_are_read_whole(root):
    blends = [blend(root, wiki=0.5, code=0.5)]
    feed = open_feed(blends, ALL, reading())
    wide = tokens(feed, 8, BLOCK + 3) + tokens(feed, BLOCK + 11, BLOCK + 3)
    alone = open_feed(blends, ALL, reading())
    assert [row for first in range(8, 80, 8) for row in tokens(alone, first, 8)] == wide[:72]
    assert tokens(alone, BLOCK + 5, 12) == wide[BLOCK - 3 : BLOCK + 9]


def test_the_seed_decides_the_order(root):
    feeds = [open_feed([blend(root, wiki=1.0)], ALL, reading(seed)) for seed in (1, 1, 2)]
    first, again, other = (tokens(feed, 0, 20) for feed in feeds)
    assert first == again != other


def test_another_blend_holds_from_its_sample_on(root):
    blends = [blend(root, wiki=1.0), blend(root, 50, code=0.5, maths=0.5)]
    feed = open_feed(blends, ALL, reading())
    corpora = list(map(corpus_of, tokens(feed, 0, 150)))
    assert set(corpora[:50]) == {"wiki"}
    assert Counter(corpora[50:]) == {"code": 50, "maths": 50}
    assert feed.samples(150) == {"wiki": 50, "code": 50, "maths": 50}


def test_a_corpus_goes_on_where_the_blend_before_left_it(root):
    blends = [blend(root, wiki=1.0), blend(root, 30, wiki=1.0, code=1.0)]
    items = 600 // LENGTH
    samples = [
        s for s in tokens(open_feed(blends, ALL, reading()), 0, 120) if corpus_of(s) == "wiki"
    ]
    assert len(samples) == items
    assert len({tuple(sample) for sample in samples}) == items, "none twice in an epoch"


def test_a_part_reads_its_own_documents_alone(root):
    feed = open_feed([blend(root, wiki=1.0)], (0.9, 1.0), reading())
    seen = {token for row in tokens(feed, 0, 50) for token in row}
    assert seen <= {END, *range(1540, 1600)}


def test_several_pairs_of_a_corpus_are_counted_together(root):
    pair = blend(root, wiki=0.5, code=0.5).corpora
    corpora = tuple(
        ResolvedCorpus(name="both", weight=corpus.weight, prefix=corpus.prefix) for corpus in pair
    )
    feed = open_feed([Blend(first_sample=0, corpora=corpora)], ALL, reading())
    assert feed.samples(10) == {"both": 10}


def test_documents_are_kept_apart_where_that_is_asked(root):
    feed = open_feed([blend(root, wiki=1.0)], ALL, reading(end=END))
    assert feed.keeps_documents_apart
    rows = Rows(16, LENGTH)
    feed.fill(rows, 0)
    assert (rows.loss_mask == 0).equal(rows.tokens == END)
    with pytest.raises(DataError, match="wiki_text_document: its documents do not end"):
        open_feed([blend(root, wiki=1.0)], ALL, reading(end=7))


def test_a_part_shorter_than_a_sample_is_refused_with_the_corpus(root):
    with pytest.raises(DataError, match="wiki_text_document of wiki has 0 samples"):
        open_feed([blend(root, wiki=1.0)], ALL, reading(length=601))


def test_a_part_without_documents_is_refused_with_the_corpus(root):
    with pytest.raises(DataError, match="wiki_text_document has 30 sequences"):
        open_feed([blend(root, wiki=1.0)], (0.999, 1.0), reading())
