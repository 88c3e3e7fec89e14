"""Which corpus the samples of a blend came from."""

import numpy as np

from megatron_mlr1 import cpu

cpu.activate()

from megatron_mlr1.engine.datasets import CorpusCount  # noqa: E402


def test_samples_are_counted_by_corpus_and_shards_together():
    which = np.array([0, 1, 2, 1, 0, 2, 2], dtype=np.int16)
    count = CorpusCount(names=("wiki", "code", "wiki"), which=which)
    assert count.samples(0) == {"wiki": 0, "code": 0}
    assert count.samples(3) == {"wiki": 2, "code": 1}
    assert count.samples(7) == {"wiki": 5, "code": 2}


def test_a_count_can_go_back_to_where_a_run_resumes():
    count = CorpusCount(names=("a", "b"), which=np.array([0, 1, 1], dtype=np.int16))
    assert count.samples(3) == {"a": 1, "b": 2}
    assert count.samples(1) == {"a": 1, "b": 0}


def test_one_corpus_alone_has_all_samples():
    assert CorpusCount(names=("only",), which=None).samples(12) == {"only": 12}
