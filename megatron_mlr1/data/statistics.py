"""What a corpus holds: lengths of its documents, how they end, and how some of them read.

All but the last tokens and the samples comes from the index alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.index import Corpus, bin_path, idx_path
from megatron_mlr1.data.tokenizers import (
    ByteTokenizer,
    RustTokenizer,
    SentencePieceTokenizer,
    TikTokenizer,
    Tokenizer,
    TransformersTokenizer,
)
from megatron_mlr1.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import ImageDraw

DOCUMENTS_A_BLOCK = 65_536
MOST_ENDS_READ = 100_000
"""Documents whose last token is read; each may cost one page of the disk."""
SAMPLE_CHARACTERS = 200
"""Characters that a sample shows of each end of its document."""
SAMPLE_TOKENS = 5 * SAMPLE_CHARACTERS
"""Tokens that are decoded for it: a character takes at most 4 where tokens are bytes."""

PANEL_WIDTH, PANEL_HEIGHT = 1000, 300
"""Size of the picture of one corpus, in pixels."""
PANEL_COLORS = {"documents": "#2a6fbb", "tokens": "#e08a1e"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Neighbouring documents, as places among the tokens of their corpus."""

    first: int
    """The number of the first of them."""
    borders: NDArray[np.int64]
    """(D + 1,): where each begins, then where the last ends, in tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBin:
    """The documents of `begin` to `end` - 1 tokens."""

    begin: int
    end: int
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What a corpus holds. Lengths are in tokens, over all documents, empty ones too."""

    prefix: str
    num_documents: int
    num_empty: int
    """Documents without a token."""
    num_sequences: int
    num_tokens: int
    dtype: str
    num_bytes: int
    """Size of both files."""
    mean_length: float
    median_length: int
    """The least length that half of the documents do not exceed."""
    p99_length: int
    """The least length that 99 % of the documents do not exceed."""
    longest_length: int
    longest_document: int
    """The number of the (first) longest document."""
    largest_percent_share: float
    """Share of the tokens that lies in the longest 1 % of the documents (at least one)."""
    last_token: int | None
    """The most common last token of a document, None where all documents are empty."""
    last_token_share: float
    """Share of the documents looked at that end with it."""
    num_ends_read: int
    """Documents looked at for that: those with tokens, at most `MOST_ENDS_READ`, evenly spread."""
    histogram: tuple[LengthBin, ...]
    """Empty documents, then powers of two, without gaps from the shortest to the longest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """How a document reads."""

    document: int
    num_tokens: int
    beginning: str
    """Its text, or the first characters of a long one."""
    ending: str | None
    """The last characters of a long one."""


def document_spans(corpus: Corpus) -> Iterator[Spans]:
    """Give the places of all documents, in order, some at a time.

    Raises:
        DataError: the index contradicts itself or the number of tokens.
    """
    begin = 0
    for first in range(0, corpus.num_documents, DOCUMENTS_A_BLOCK):
        ends = corpus.document_ends[first : first + DOCUMENTS_A_BLOCK + 1]
        if (np.diff(ends) < 0).any():
            raise _contradicts(corpus, f"lets a document end before it begins, after {first}")
        lengths = corpus.lengths[ends[0] : ends[-1]]
        if (lengths < 0).any():
            raise _contradicts(corpus, f"has a sequence of negative length, after document {first}")
        places = begin + np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        yield Spans(first=first, borders=places[ends - ends[0]])
        begin = int(places[-1])
    if begin != corpus.num_tokens:
        raise _contradicts(corpus, f"has sequences of {begin} of {corpus.num_tokens} tokens")


def statistics(corpus: Corpus) -> Statistics:
    """Measure a corpus. Memory: 16 bytes a document.

    Raises:
        DataError: the index contradicts itself.
    """
    borders = np.zeros(corpus.num_documents + 1, np.int64)
    for span in document_spans(corpus):
        borders[span.first : span.first + span.borders.size] = span.borders
    last_token, last_token_share, num_ends_read = _last_token(corpus, borders)
    lengths = np.diff(borders)
    longest = int(lengths.argmax())
    lengths.sort()
    num_largest = max(1, lengths.size // 100)
    return Statistics(
        prefix=corpus.prefix,
        num_documents=corpus.num_documents,
        num_empty=int(np.searchsorted(lengths, 1)),
        num_sequences=corpus.lengths.size,
        num_tokens=corpus.num_tokens,
        dtype=corpus.tokens.dtype.name,
        num_bytes=sum(
            path.stat().st_size for path in (bin_path(corpus.prefix), idx_path(corpus.prefix))
        ),
        mean_length=corpus.num_tokens / lengths.size,
        median_length=_quantile(lengths, 1, 2),
        p99_length=_quantile(lengths, 99, 100),
        longest_length=int(lengths[-1]),
        longest_document=longest,
        largest_percent_share=int(lengths[-num_largest:].sum()) / corpus.num_tokens,
        last_token=last_token,
        last_token_share=last_token_share,
        num_ends_read=num_ends_read,
        histogram=_histogram(lengths),
    )


def samples(
    corpus: Corpus, tokenizer: Tokenizer, num_samples: int, seed: int
) -> tuple[Sample, ...]:
    """Decode some documents, drawn without return from all by `seed`, in their order.

    Raises:
        DataError: a token is none of the tokenizer's, or the index contradicts itself.
        ConfigError: the tokenizer cannot turn tokens into text.
    """
    rng = np.random.default_rng(seed)
    size = min(num_samples, corpus.num_documents)
    numbers = np.sort(rng.choice(corpus.num_documents, size, replace=False))
    drawn = []
    for span in document_spans(corpus):
        here = numbers[(numbers >= span.first) & (numbers < span.first + span.borders.size - 1)]
        for number in here.tolist():
            begin, end = span.borders[number - span.first : number - span.first + 2].tolist()
            drawn.append(_sample(corpus, tokenizer, number, range(begin, end)))
    return tuple(drawn)


def decode(tokenizer: Tokenizer, tokens: NDArray[np.integer], prefix: str) -> str:
    """Turn tokens of the corpus `prefix` into text, special tokens too.

    Raises:
        DataError: a token is none of the tokenizer's.
        ConfigError: the tokenizer cannot turn tokens into text.
    """
    ids: list[int] = tokens.tolist()
    strange = next((token for token in ids if not 0 <= token < tokenizer.vocab_size), None)
    if strange is not None:
        raise DataError(
            f"{bin_path(prefix)} holds the token {strange} and the tokenizer has "
            f"{tokenizer.vocab_size} ids. Name the tokenizer that made this corpus."
        )
    match tokenizer:
        case ByteTokenizer():
            return bytes(token for token in ids if token < 256).decode(errors="replace")
        case SentencePieceTokenizer(processor=processor):
            return str(processor.decode(ids))
        case RustTokenizer(backend=backend):
            return str(backend.decode(ids, skip_special_tokens=False))
        case TikTokenizer(encoding=encoding):
            return str(encoding.decode(ids))
        case TransformersTokenizer(tokenizer=loaded):
            return str(loaded.decode(ids, skip_special_tokens=False))
    raise ConfigError(
        f"{type(tokenizer).__name__} cannot turn tokens into text. Leave --tokenizer-type out."
    )


def draw_lengths(found: Sequence[Statistics], file: BinaryIO) -> None:
    """Draw the histogram of each corpus, one below the other, on one scale of lengths, as a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL import Image, ImageDraw

    begins = [part.begin for it in found for part in it.histogram]
    edges = [0, *(1 << power for power in range(max(begins).bit_length()))]
    edges = edges[edges.index(min(begins)) :]
    picture = Image.new("RGB", (PANEL_WIDTH, PANEL_HEIGHT * len(found)), "white")
    for number, it in enumerate(found):
        panel = Image.new("RGB", (PANEL_WIDTH, PANEL_HEIGHT), "white")
        _draw_panel(ImageDraw.Draw(panel), it, edges)
        picture.paste(panel, (0, number * PANEL_HEIGHT))
    picture.save(file, "PNG")


def _draw_panel(pen: "ImageDraw.ImageDraw", it: Statistics, edges: Sequence[int]) -> None:
    from PIL import ImageFont

    left, right, top, base = 60, PANEL_WIDTH - 20, 70, PANEL_HEIGHT - 60
    large, small = ImageFont.load_default(18), ImageFont.load_default(13)
    title = f"{it.num_documents:,} documents, {it.num_tokens:,} tokens"
    pen.text((left, 12), f"{it.prefix[-50:]}: {title}", "black", large)
    for i, (name, color) in enumerate(PANEL_COLORS.items()):
        pen.rectangle((left + i * 200, 44, left + i * 200 + 12, 56), color)
        pen.text((left + i * 200 + 20, 42), f"share of the {name}", "black", small)
    shares = {
        part.begin: (part.num_documents / it.num_documents, part.num_tokens / it.num_tokens)
        for part in it.histogram
    }
    most = max(max(both) for both in shares.values())
    for line in range(5):
        y = base - (base - top) * line / 4
        pen.line((left, y, right, y), "#dddddd")
        pen.text((left - 6, y), f"{most * line / 4:.1%}", "black", small, "rm")
    step = (right - left) / len(edges)
    for i, edge in enumerate(edges):
        pen.text((left + step * (i + 0.5), base + 6), _short(edge), "black", small, "mt")
        for j, (share, color) in enumerate(
            zip(shares.get(edge, (0, 0)), PANEL_COLORS.values(), strict=True)
        ):
            x = left + step * (i + 0.1 + 0.4 * j)
            if share:
                y = base - (base - top) * share / most
                pen.rectangle((x, y, x + step * 0.38, base), color)
    pen.text((left, base + 26), "tokens of a document: from this number on", "black", small)


def _short(number: int) -> str:
    """Write a power of two as one does: 512, 4Ki, 2Mi."""
    for unit, power in (("Gi", 30), ("Mi", 20), ("Ki", 10)):
        if number >= 1 << power:
            return f"{number >> power}{unit}"
    return str(number)


def _quantile(ordered: NDArray[np.int64], numerator: int, denominator: int) -> int:
    return int(ordered[-(-ordered.size * numerator // denominator) - 1])


def _histogram(ordered: NDArray[np.int64]) -> tuple[LengthBin, ...]:
    edges = [0, *(1 << power for power in range(int(ordered[-1]).bit_length() + 1))]
    places = np.searchsorted(ordered, edges)
    bins = [
        LengthBin(
            begin=begin,
            end=end,
            num_documents=int(right - left),
            num_tokens=int(ordered[left:right].sum()),
        )
        for begin, end, left, right in zip(
            edges[:-1], edges[1:], places[:-1], places[1:], strict=True
        )
    ]
    shortest = next(i for i, part in enumerate(bins) if part.num_documents)
    return tuple(bins[shortest:])


def _last_token(corpus: Corpus, borders: NDArray[np.int64]) -> tuple[int | None, float, int]:
    full = np.flatnonzero(borders[1:] > borders[:-1])
    if full.size > MOST_ENDS_READ:
        full = full[np.linspace(0, full.size - 1, MOST_ENDS_READ).astype(np.int64)]
    if full.size == 0:
        return None, 0.0, 0
    tokens, counts = np.unique(corpus.tokens[borders[full + 1] - 1], return_counts=True)
    most = int(counts.argmax())
    return int(tokens[most]), int(counts[most]) / full.size, full.size


def _sample(corpus: Corpus, tokenizer: Tokenizer, document: int, places: range) -> Sample:
    ending = None
    if len(places) <= SAMPLE_TOKENS:
        text = decode(tokenizer, corpus.tokens[places.start : places.stop], corpus.prefix)
        if len(text) > 2 * SAMPLE_CHARACTERS:
            text, ending = text[:SAMPLE_CHARACTERS], text[-SAMPLE_CHARACTERS:]
    else:
        head = corpus.tokens[places.start : places.start + SAMPLE_TOKENS]
        tail = corpus.tokens[places.stop - SAMPLE_TOKENS : places.stop]
        text = decode(tokenizer, head, corpus.prefix)[:SAMPLE_CHARACTERS]
        ending = decode(tokenizer, tail, corpus.prefix)[-SAMPLE_CHARACTERS:]
    return Sample(document=document, num_tokens=len(places), beginning=text, ending=ending)


def _contradicts(corpus: Corpus, what: str) -> DataError:
    return DataError(
        f"{idx_path(corpus.prefix)} {what}. Make the corpus again with tools/preprocess_data.py."
    )
