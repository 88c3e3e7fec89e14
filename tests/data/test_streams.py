"""Parts of a corpus by the engine's borders, and samples that read each token once an epoch."""

from itertools import pairwise

import numpy as np
import pytest

from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.splits import refuse_empty_parts
from megatron_mlr1.data.streams import TokenPart, part_of, stream_key
from megatron_mlr1.errors import DataError
from tests.support.corpora import patch, place, write_corpus, write_random_corpus

NUM_SEQUENCES = 1000


def part(num_tokens, first_token=0):
    return TokenPart(
        prefix="any", dtype=np.dtype("<u2"), first_token=first_token, num_tokens=num_tokens
    )


@pytest.mark.parametrize(("num_tokens", "length"), [(1003, 10), (1000, 10), (10, 10), (77, 1)])
def test_no_token_is_an_input_twice_in_an_epoch(num_tokens, length):
    ring = part(num_tokens)
    num_items = ring.num_items(length)
    assert num_items == num_tokens // length
    for epoch in range(20):
        items = np.arange(num_items)
        begins = ring.origin(np.full(num_items, epoch), items, length, key=9)
        assert begins.dtype == np.int64
        inputs = (begins[:, None] + np.arange(length)) % num_tokens
        assert np.bincount(inputs.ravel(), minlength=num_tokens).max() == 1
        assert inputs.size > num_tokens - length
        # The last label of each sample is the first input of the next.
        assert np.array_equal((begins[:-1] + length) % num_tokens, begins[1:])


def test_samples_begin_elsewhere_each_epoch_and_evenly():
    ring, length = part(10_000), 100
    begins = ring.origin(np.arange(20_000), np.zeros(20_000, np.int64), length, key=9)
    counts = np.bincount(begins // 100, minlength=100)
    freedom = 99
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi_square - freedom) / np.sqrt(2 * freedom) < 4.5
    assert abs(np.corrcoef(begins[:-1], begins[1:])[0, 1]) < 4 / np.sqrt(20_000)


def test_what_an_epoch_leaves_out_the_others_read():
    ring, length = part(1019), 100
    left_out = []
    for epoch in range(8):
        begins = ring.origin(np.full(10, epoch), np.arange(10), length, key=9)
        inputs = (begins[:, None] + np.arange(length)) % 1019
        left_out.append(set(range(1019)) - set(inputs.ravel().tolist()))
    assert all(len(tokens) == 19 for tokens in left_out)
    assert not set.intersection(*left_out)


def test_keys_depend_on_the_seed_and_the_name_and_nothing_else():
    keys = [stream_key(*it) for it in ((1, "a"), (2, "a"), (1, "b"), (12, "a"), (1, "2a"))]
    assert len(set(keys)) == 5
    # Written down once: another value would change the order of every run.
    assert stream_key(1234, "wiki_text_document") == 16865822862165803139
    origins = {key: part(10**9).origin(np.int64(0), np.int64(0), 10, key).item() for key in keys}
    assert len(set(origins.values())) == 5


def test_origins_reach_the_end_of_the_largest_part():
    begins = part(2**43).origin(np.arange(1000), np.arange(1000), 2048, key=2**64 - 1)
    assert 0 <= begins.min() < 2**43 * 0.02
    assert 2**43 * 0.98 < begins.max() < 2**43


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
@pytest.mark.parametrize("parts", [[0, 0.9, 0.95, 1], [0, 1, 1, 1], [0, 0.0015, 0.0035, 1]])
def test_parts_hold_the_engines_sequences(parts, dtype, tmp_path):
    write_random_corpus(tmp_path / "c", NUM_SEQUENCES, seed=3, dtype=dtype)
    corpus = open_corpus(f"{tmp_path}/c")
    for begin, end in pairwise(parts):
        if begin == end:
            continue
        found = part_of(f"{tmp_path}/c", begin, end)
        first, last = (round(x * float(NUM_SEQUENCES)) for x in (begin, end))
        assert found.num_tokens == corpus.lengths[first:last].sum()
        assert found.first_token == corpus.lengths[:first].sum()
        assert found.dtype == np.dtype(dtype)


def test_a_part_is_refused_where_the_splits_refuse_it(tmp_path):
    prefix = f"{tmp_path}/c"
    write_corpus(tmp_path / "c", [3] * 10, [1] * 10)
    for begin, end in ((0.9, 0.94), (0.999, 1.0)):
        with pytest.raises(DataError, match="none of them for training"):
            refuse_empty_parts([prefix], [(begin, end), None, None])
        with pytest.raises(DataError, match=r"10 sequences, and the part from .* holds no token"):
            part_of(prefix, begin, end)


def test_a_part_of_empty_documents_is_refused(tmp_path):
    write_corpus(tmp_path / "c", [5, 0, 0, 5], [1] * 4)
    with pytest.raises(DataError, match="holds no token"):
        part_of(f"{tmp_path}/c", 0.25, 0.75)


def test_a_corpus_that_was_cut_short_or_is_anothers_is_refused(tmp_path):
    write_corpus(tmp_path / "c", [5, 5], [1, 1])
    tokens = tmp_path / "c.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"c\.bin has 18 bytes where its index makes 20"):
        part_of(f"{tmp_path}/c", 0.0, 1.0)
    tokens.write_bytes(whole)
    patch(tmp_path / "c.idx", place("begin", 1, 2), "q", 10**6)
    with pytest.raises(DataError, match=r"c\.bin has 20 bytes"):
        part_of(f"{tmp_path}/c", 0.0, 1.0)
