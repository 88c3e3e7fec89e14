"""Corpora that are the same on every machine, and a tokenizer for any number of ids.

The tokens are a language that a model can learn: in half of the places a token decides the next
one, in the others the next is drawn by Zipf's law. Nothing is downloaded, no tokenizer is trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.index import DocumentBlock, IndexWriter, token_dtype

END: Final = 0
"""The id that ends a document."""
NAME: Final = "synthetic"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """How much of the language is written."""

    num_ids: int
    """Of the tokenizer: ids are smaller, and 0 ends documents."""
    num_tokens: int
    """At the least; the last document is whole."""
    document_tokens: int
    """Tokens of a document on average, its end included; the lengths are exponential."""
    seed: int = 0


def write(root: Path, corpus: Corpus) -> Path:
    """Write corpus and tokenizer below `root`; give the mixture's file.

    Args:
        root: a folder, which is made; `--data-root` of a run.
        corpus: what to write.
    """
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(corpus.seed)
    lengths = _lengths(random, corpus)
    tokens = language(random, corpus.num_ids, int(lengths.sum()))
    tokens[np.cumsum(lengths) - 1] = END
    writer = IndexWriter(str(root / f"{NAME}_text_document"), token_dtype(corpus.num_ids))
    writer.write(DocumentBlock(tokens, lengths, np.ones(len(lengths), np.int64)))
    writer.seal()
    writer.publish()
    _write_tokenizer(root / "tokenizer", corpus.num_ids)
    mixture = root / "mixture.yaml"
    mixture.write_text(
        f"about: a language of {corpus.num_ids} tokens\n"
        f"corpora:\n  {NAME}: {{weight: 1.0, dataset: made for a benchmark}}\n"
    )
    return mixture


def _lengths(random: np.random.Generator, corpus: Corpus) -> NDArray[np.int64]:
    lengths: list[int] = []
    left = corpus.num_tokens
    while left > 0:
        lengths.append(2 + int(random.exponential(corpus.document_tokens - 2)))
        left -= lengths[-1]
    return np.array(lengths, np.int64)


def language(random: np.random.Generator, num_ids: int, num_tokens: int) -> NDArray[np.int64]:
    """Write `num_tokens` tokens in [1, num_ids).

    In every other place, by a coin, the next token is f(token) = 1 + (a * token + 7) mod
    (num_ids - 1); elsewhere its rank is drawn with a probability of about 1 / rank.
    """
    ranks = np.exp(random.random(num_tokens) * np.log(num_ids - 1)).astype(np.int64)
    tokens: NDArray[np.int64] = np.minimum(ranks, num_ids - 1)
    follows = random.random(num_tokens) < 0.5
    for place in np.flatnonzero(follows[1:]) + 1:
        tokens[place] = 1 + (48_271 * tokens[place - 1] + 7) % (num_ids - 1)
    return tokens


def _write_tokenizer(folder: Path, num_ids: int) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words: dict[str, Any] = {"<|end|>": END} | {f"t{n}": n for n in range(1, num_ids)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|end|>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
