"""What is found is exactly what a search with Python's own sets finds."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from megatron_mlr1.data import overlap as module
from megatron_mlr1.data.index import Corpus, DocumentBlock, IndexWriter, open_corpus
from megatron_mlr1.data.overlap import (
    MULTIPLIER,
    ContaminatedDocument,
    Grams,
    Overlap,
    find_overlap,
    hashes_at,
    window_hashes,
)
from megatron_mlr1.errors import ConfigError, DataError

COLLISION = np.array([781, -2310, 3471, -2542, -3096])
"""Added to five neighbouring tokens it leaves the hash as it is; a short vector of the lattice of
all such, found by its reduction (Lenstra, Lenstra, Lovasz 1982)."""

type Documents = list[list[int]]
type Make = Callable[[str, Documents], Corpus]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(name: str, documents: Documents, dtype: str = "<u2") -> Corpus:
        writer = IndexWriter(f"{tmp_path}/{name}", np.dtype(dtype))
        full = [document for document in documents if document]
        writer.write(
            DocumentBlock(
                tokens=np.array([token for document in full for token in document], np.int64),
                lengths=np.array([len(document) for document in full], np.int64),
                sequences=np.array([bool(document) for document in documents], np.int64),
            )
        )
        writer.seal()
        writer.publish()
        return open_corpus(f"{tmp_path}/{name}")

    return write


def grams_of(document: list[int], n: int, eod: int | None) -> list[tuple[int, ...]]:
    """The definition: all n neighbours, or the whole of a document that has fewer tokens."""
    kept = document[:-1] if document and document[-1] == eod else document
    if len(kept) < n:
        return [tuple(kept)] if kept else []
    return [tuple(kept[i : i + n]) for i in range(len(kept) - n + 1)]


def search(
    corpus: Corpus, benchmarks: list[Corpus], n: int, eod: int | None = None
) -> tuple[Overlap, list[ContaminatedDocument]]:
    found: list[ContaminatedDocument] = []
    done: list[int] = []
    result = find_overlap(corpus, Grams(benchmarks, n, eod), found.append, done.append)
    assert sum(done) == corpus.num_tokens
    return result, found


def check(
    result: Overlap,
    found: list[ContaminatedDocument],
    big: Documents,
    small: list[Documents],
    n: int,
    eod: int | None,
) -> None:
    in_big = [grams_of(document, n, eod) for document in big]
    rows = [
        (benchmark, number, grams_of(document, n, eod))
        for benchmark, documents in enumerate(small)
        for number, document in enumerate(documents)
    ]
    firsts: dict[tuple[int, ...], int] = {}
    for number, grams in enumerate(in_big):
        for gram in grams:
            firsts.setdefault(gram, number)
    homes: dict[tuple[int, ...], tuple[int, int]] = {}
    for benchmark, number, grams in rows:
        for gram in grams:
            homes.setdefault(gram, (benchmark, number))

    assert list(zip(result.benchmark.tolist(), result.document.tolist(), strict=True)) == [
        row[:2] for row in rows
    ]
    assert result.num_grams.tolist() == [len(grams) for *_, grams in rows]
    assert result.num_found.tolist() == [sum(g in firsts for g in grams) for *_, grams in rows]
    assert result.first_document.tolist() == [
        min((firsts[g] for g in grams if g in firsts), default=-1) for *_, grams in rows
    ]
    expected = []
    for number, grams in enumerate(in_big):
        places = [place for place, gram in enumerate(grams) if gram in homes]
        if places:
            gram = grams[places[0]]
            expected.append((number, len(big[number]), len(places), places[0], gram, *homes[gram]))
    assert [
        (
            *(one.document, one.num_tokens, one.num_found, one.place),
            *(tuple(one.gram.tolist()), one.against, one.against_document),
        )
        for one in found
    ] == expected
    assert result.num_documents == len(expected)
    assert result.num_places == sum(row[2] for row in expected)
    assert result.largest_token == max(token for document in big for token in document)


def draw(rng: np.random.Generator, num_documents: int, longest: int, ids: int) -> Documents:
    lengths = rng.integers(0, longest + 1, num_documents)
    return [rng.integers(0, ids, length).tolist() for length in lengths]


SIZES = [
    *product([1, 2, 3, 5, 8, 13], [None, 0], [7, 1 << 18]),
    # Blocks of one token take longest.
    *[(1, None, 1), (2, 0, 1), (5, None, 1), (13, 0, 1)],
]


@pytest.mark.parametrize(("n", "eod", "block_tokens"), SIZES)
def test_it_finds_what_sets_find(
    n: int, eod: int | None, block_tokens: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few ids, so that chance alone makes many equal grams; and pieces copied for long ones.
    rng = np.random.default_rng(n)
    big = draw(rng, 60, 40, 3)
    small = [draw(rng, 15, 20, 3), draw(rng, 10, 3, 3)]
    small[0] += [big[i][2:] for i in range(0, 60, 7)] + [big[5], [2] * 20 + big[9]]
    big += [[], small[0][0] + [0], [2] * 90]
    monkeypatch.setattr(module, "BLOCK_TOKENS", block_tokens)

    benchmarks = [make(f"small{i}", documents) for i, documents in enumerate(small)]
    result, found = search(make("big", big), benchmarks, n, eod)
    assert result.num_documents > 0
    check(result, found, big, small, n, eod)


def test_blocks_of_documents_do_not_show(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    big, small = draw(rng, 40, 12, 2), draw(rng, 10, 9, 2)
    corpus, benchmark = make("big", big), make("small", small)
    for size in (1, 2, 5):
        monkeypatch.setattr("megatron_mlr1.data.statistics.DOCUMENTS_A_BLOCK", size)
        check(*search(corpus, [benchmark], 4), big, [small], 4, None)


def test_no_gram_reaches_over_the_end_of_a_document(make: Make) -> None:
    result, found = search(make("big", [[1, 2], [3, 4]]), [make("small", [[2, 3], [1, 2]])], 2)
    assert result.num_found.tolist() == [0, 1]
    assert [one.document for one in found] == [0]


def test_a_short_document_is_found_only_as_a_whole_document(make: Make) -> None:
    small = make("small", [[5, 6, 7]])
    inside, _ = search(make("inside", [[4, 5, 6, 7, 8], [5, 6], [5, 6, 7, 8]]), [small], 4)
    assert inside.num_found.tolist() == [0]
    whole, found = search(make("whole", [[1], [5, 6, 7], [5, 6, 7, 9]]), [small], 4)
    assert whole.num_found.tolist() == [1]
    assert [one.document for one in found] == [1]
    closed, found = search(make("closed", [[1], [5, 6, 7, 9]]), [small], 4, eod=9)
    assert closed.num_found.tolist() == [1]
    assert [(one.document, one.num_tokens) for one in found] == [(1, 4)]


def test_types_of_tokens_may_differ(make: Make, tmp_path: Path) -> None:
    big, small = [[1, 2, 65499, 4]], [[2, 65499, 4], [70000, 1, 2]]
    wide = make("wide", small, "<i4")  # type: ignore[call-arg]
    check(*search(make("narrow", big), [wide], 3), big, [small], 3, None)
    narrow = make("narrow_small", small[:1])
    check(*search(make("wide_big", big, "<i4"), [narrow], 3), big, [small[:1]], 3, None)  # type: ignore[call-arg]


def test_grams_of_equal_hash_are_told_apart(make: Make) -> None:
    plain = np.full(5, 20_000)
    twin = plain + COLLISION
    both = np.concatenate([plain, twin])
    one, other = hashes_at(both, np.array([0, 5]), 5)
    assert one == other

    a, b = plain.tolist(), twin.tolist()
    missed, found = search(make("big", [a]), [make("small", [b])], 5)
    assert (missed.num_found.tolist(), found) == ([0], [])
    small = [a, b, a, [*b, 1]]
    for name, big in (("1", [b, a]), ("2", [[7, *b]]), ("3", [a])):
        result, found = search(make(f"big{name}", big), [make(f"small{name}", small)], 5)
        check(result, found, big, [small], 5, None)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 13, 16, 50])
@pytest.mark.parametrize("size", [0, 1, 12, 13, 100])
def test_window_hashes_are_the_polynomial(length: int, size: int) -> None:
    tokens = np.random.default_rng(size).integers(0, 128_256, size).astype("<i4")
    expected = [
        sum(int(t) * MULTIPLIER ** (length - j) for j, t in enumerate(tokens[i : i + length]))
        % (1 << 64)
        for i in range(size - length + 1)
    ]
    assert window_hashes(tokens, length).tolist() == expected
    assert hashes_at(tokens, np.arange(len(expected)), length).tolist() == expected


def test_nothing_to_look_for_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="--ngram is 0"):
        Grams([make("small", [[1]])], 0, None)
    with pytest.raises(DataError, match="closed: no document has a token"):
        Grams([make("closed", [[9], [9]])], 2, 9)
