import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mlr1.data import statistics as module
from megatron_mlr1.data.index import Corpus, DocumentBlock, IndexWriter, open_corpus, token_dtype
from megatron_mlr1.data.statistics import (
    LengthBin,
    Statistics,
    decode,
    document_spans,
    draw_lengths,
    samples,
    statistics,
)
from megatron_mlr1.data.tokenizers import TokenizerPlan, load_tokenizer
from megatron_mlr1.errors import DataError

BYTES = load_tokenizer(TokenizerPlan(tokenizer_type="ByteLevelTokenizer"))


def corpus_of(documents: list[list[list[int]]], prefix: Path, vocab_size: int = 512) -> Corpus:
    sequences = [sequence for document in documents for sequence in document]
    writer = IndexWriter(str(prefix), token_dtype(vocab_size))
    writer.write(
        DocumentBlock(
            tokens=np.array([token for sequence in sequences for token in sequence], np.int64),
            lengths=np.array([len(sequence) for sequence in sequences], np.int64),
            sequences=np.array([len(document) for document in documents], np.int64),
        )
    )
    writer.seal()
    writer.publish()
    return open_corpus(str(prefix))


def corpus_of_lengths(lengths: list[int], prefix: Path) -> Corpus:
    return corpus_of([[[7] * length] if length else [] for length in lengths], prefix)


@pytest.mark.parametrize("num_documents", [1, 2, 99, 100, 101, 250])
def test_figures_are_those_of_their_definitions(num_documents: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(num_documents)
    lengths = rng.geometric(0.01, num_documents)
    lengths[rng.random(num_documents) < 0.2] = 0
    lengths[-1] += 1
    it = statistics(corpus_of_lengths(lengths.tolist(), tmp_path / "c"))

    largest = np.sort(lengths)[::-1][: max(1, num_documents // 100)]
    assert (it.num_documents, it.num_tokens) == (num_documents, lengths.sum())
    assert it.num_empty == (lengths == 0).sum()
    assert it.mean_length == lengths.mean()
    assert it.median_length == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert it.p99_length == np.sort(lengths)[int(np.ceil(num_documents * 99 / 100)) - 1]
    assert (it.longest_length, it.longest_document) == (lengths.max(), lengths.argmax())
    assert it.largest_percent_share == largest.sum() / lengths.sum()
    assert it.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    for part in it.histogram:
        mine = lengths[(lengths >= part.begin) & (lengths < part.end)]
        assert (part.num_documents, part.num_tokens) == (mine.size, mine.sum())
    assert sum(part.num_documents for part in it.histogram) == num_documents
    assert sum(part.num_tokens for part in it.histogram) == lengths.sum()


def test_the_histogram_has_powers_of_two_from_the_shortest_to_the_longest(tmp_path: Path) -> None:
    def bins(name: str, lengths: list[int]) -> list[tuple[int, int, int]]:
        parts = statistics(corpus_of_lengths(lengths, tmp_path / name)).histogram
        return [(part.begin, part.end, part.num_documents) for part in parts]

    assert bins("a", [3, 4, 4, 15]) == [(2, 4, 1), (4, 8, 2), (8, 16, 1)]
    assert bins("b", [0, 16]) == [
        (0, 1, 1),
        (1, 2, 0),
        (2, 4, 0),
        (4, 8, 0),
        (8, 16, 0),
        (16, 32, 1),
    ]
    assert bins("c", [1]) == [(1, 2, 1)]


def test_a_document_of_several_sequences_is_one_document(tmp_path: Path) -> None:
    it = statistics(corpus_of([[[1, 2], [3]], [], [[4]]], tmp_path / "c"))
    assert (it.num_documents, it.num_sequences, it.longest_length) == (3, 3, 3)


def test_spans_do_not_depend_on_how_many_documents_a_block_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [3, 0, 1, 5, 0, 0, 2]
    corpus = corpus_of_lengths(lengths, tmp_path / "c")
    for size in (1, 2, 3, 7, 8):
        monkeypatch.setattr(module, "DOCUMENTS_A_BLOCK", size)
        spans = list(document_spans(corpus))
        assert [span.first for span in spans] == list(range(0, 7, size))
        found = np.concatenate([np.diff(span.borders) for span in spans])
        assert found.tolist() == lengths


def test_the_last_token_of_most_documents_is_named_with_its_share(tmp_path: Path) -> None:
    corpus = corpus_of([[[1, 9]], [], [[2], [3, 9]], [[9, 1]], [[9]]], tmp_path / "c")
    it = statistics(corpus)
    assert (it.last_token, it.last_token_share, it.num_ends_read) == (9, 3 / 4, 4)


def test_of_many_documents_some_ends_are_read_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpus_of([[[1, 5]], [[1, 6]], [[1, 6]], [[1, 7]], [[1, 5]]], tmp_path / "c")
    monkeypatch.setattr(module, "MOST_ENDS_READ", 2)
    it = statistics(corpus)
    assert (it.last_token, it.last_token_share, it.num_ends_read) == (5, 1.0, 2)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        # Behind the header: lengths i32[3], begins i64[3], document ends i64[4].
        (34, -1, "sequence of negative length"),
        (34, 3, "has sequences of 7 of 6 tokens"),
        (34 + 36 + 8, 3, "ends before it begins|end before it begins"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(
    place: int, value: int, message: str, tmp_path: Path
) -> None:
    corpus_of_lengths([2, 2, 2], tmp_path / "c")
    path = tmp_path / "c.idx"
    data = bytearray(path.read_bytes())
    width = 4 if place == 34 else 8
    data[place : place + width] = value.to_bytes(width, "little", signed=True)
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"c\.idx .*{message}"):
        statistics(open_corpus(f"{tmp_path}/c"))


def test_samples_are_drawn_by_the_seed_and_in_order(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(50)]
    corpus = corpus_of([[list(text.encode())] for text in texts], tmp_path / "c")
    drawn = samples(corpus, BYTES, 10, seed=1)
    numbers = [sample.document for sample in drawn]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 10
    assert [sample.beginning for sample in drawn] == [texts[number] for number in numbers]
    assert {sample.ending for sample in drawn} == {None}
    assert drawn == samples(corpus, BYTES, 10, seed=1)
    assert drawn != samples(corpus, BYTES, 10, seed=2)
    every = samples(corpus, BYTES, 60, seed=1)
    assert [sample.beginning for sample in every] == texts


@pytest.mark.parametrize("num_characters", [0, 1, 400, 401, 1000, 5000])
@pytest.mark.parametrize("character", ["x", "🙂"])
def test_a_long_document_shows_both_its_ends(
    num_characters: int, character: str, tmp_path: Path
) -> None:
    text = (
        ("a" + character * num_characters)[:-2] + "yz"
        if num_characters > 1
        else "x" * num_characters
    )
    corpus = corpus_of([[list(text.encode())] if text else [], [[65]]], tmp_path / "c")
    sample = samples(corpus, BYTES, 2, seed=0)[0]
    assert sample.num_tokens == len(text.encode())
    if len(text) <= 400:
        assert (sample.beginning, sample.ending) == (text, None)
    else:
        assert (sample.beginning, sample.ending) == (text[:200], text[-200:])


def test_every_tokenizer_gives_its_text_back(
    tmp_path: Path, train_bpe: Callable[..., Path], sentencepiece_model: Path, texts: list[str]
) -> None:
    plain = train_bpe(tmp_path / "plain", begins=False)
    splitting = train_bpe(tmp_path / "splitting", begins=False, split_special_tokens=True)
    plans = [
        TokenizerPlan(tokenizer_type="ByteLevelTokenizer"),
        TokenizerPlan(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(plain)),
        TokenizerPlan(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(splitting)),
        TokenizerPlan(
            tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(sentencepiece_model)
        ),
    ]
    text = next(text for text in texts if len(text) > 40).strip()
    loaded = [load_tokenizer(plan) for plan in plans]
    assert len({type(tokenizer) for tokenizer in loaded}) == 4
    for tokenizer in loaded:
        decoded = decode(tokenizer, np.array(tokenizer.encode([text])[0]), "c")
        # SentencePiece joins neighbouring blanks by its nature.
        assert decoded.split() == text.split()


def test_a_token_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    corpus = corpus_of([[[65, 512]]], tmp_path / "c")
    with pytest.raises(DataError, match=r"c\.bin holds the token 512 .* 512 ids"):
        samples(corpus, BYTES, 1, seed=0)


def measured(num_documents: int, parts: list[tuple[int, int]]) -> Statistics:
    return Statistics(
        prefix="c",
        num_documents=num_documents,
        num_empty=0,
        num_sequences=num_documents,
        num_tokens=sum(begin * count for begin, count in parts),
        dtype="uint16",
        num_bytes=1,
        mean_length=1.0,
        median_length=1,
        p99_length=1,
        longest_length=1,
        longest_document=0,
        largest_percent_share=1.0,
        last_token=None,
        last_token_share=0.0,
        num_ends_read=0,
        histogram=tuple(
            LengthBin(begin=begin, end=2 * begin, num_documents=count, num_tokens=begin * count)
            for begin, count in parts
        ),
    )


def test_bars_of_the_picture_are_as_high_as_their_shares() -> None:
    file = io.BytesIO()
    draw_lengths([measured(8, [(1, 6), (2, 2)]), measured(4, [(4, 4)])], file)
    with Image.open(file) as picture:
        assert picture.size == (1000, 600)
        pixels = np.asarray(picture.convert("RGB"))
    blue = (pixels == (0x2A, 0x6F, 0xBB)).all(axis=-1)
    # Lengths 1, 2 and 4 share the width from 60 to 980; the legend is above row 60.
    thirds = [blue[60:300, 60 + 307 * i : 60 + 307 * (i + 1)] for i in range(3)]
    heights = [int(third.sum(axis=0).max()) for third in thirds]
    assert heights[0] == pytest.approx(3 * heights[1], abs=3)
    assert heights[2] == 0
    below = [blue[360:, 60 + 307 * i : 60 + 307 * (i + 1)].any() for i in range(3)]
    assert below == [False, False, True]
