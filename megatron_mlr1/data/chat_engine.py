"""Text with special tokens to ids: gigatoken, as long as it agrees with `tokenizers`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.fast_tokenizer import FastTokenizer, hard_texts

CHECKED_TEXTS = 256
"""Texts on which both must agree, of those that this process sees first."""


class CheckedEncoder:
    """Encodes text that may hold special tokens; its ids are those of `tokenizers`.

    Hard texts and the first ones of the input are encoded by both. Where an id differs, or
    gigatoken does not know such a tokenizer, `tokenizers` does the work alone: the same ids, about
    fifty times slower.
    """

    def __init__(self, backend: Any, special: Sequence[str]) -> None:
        """Take a `tokenizers.Tokenizer`, and its special tokens."""
        self._backend = backend
        self._unchecked = CHECKED_TEXTS
        try:
            self._fast: FastTokenizer | None = FastTokenizer(backend.to_str().encode(), threads=1)
        except (ImportError, ValueError):
            self._fast = None
        else:
            self._compare(hard_texts(special))

    @property
    def is_fast(self) -> bool:
        """Whether gigatoken does the work."""
        return self._fast is not None

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Give the ids of each text; nothing is added to it."""
        if self._unchecked and self._fast is not None:
            first = texts[: self._unchecked]
            self._unchecked -= len(first)
            self._compare(first)
        if self._fast is None or not texts:
            return self._true(texts)
        ids = self._fast.encode(texts)
        return np.split(ids.flat, np.cumsum(ids.lengths)[:-1])

    def _compare(self, texts: list[str]) -> None:
        if self._fast is not None and texts:
            ids = self._fast.encode(texts)
            fast = np.split(ids.flat, np.cumsum(ids.lengths)[:-1])
            if not all(map(np.array_equal, fast, self._true(texts))):
                self._fast = None

    def _true(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]
