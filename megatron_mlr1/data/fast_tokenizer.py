"""The fast way from text to ids: gigatoken, which must agree with `tokenizers` to be used.

Its reading of files is never used: of a file with one bad record it loses others without a word.
Texts are read here, handed over in memory, and counted on both sides.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import numpy as np
import psutil

from megatron_mlr1.data.documents import Frame, Ids

MEMORY_BYTES = 560 * 2**20
"""How large the process may become before the tokenizer is loaded anew: it remembers every word it
met, and forgets none (15 bytes a character of random words, measured with 0.10.0)."""
CACHE_BYTES = 128 * 2**20
"""How far memory may grow in any case, since loading anew takes a second."""
SAMPLE_CHARACTERS = 2**12
"""A longer document is compared by its beginning."""
NUM_SPECIAL = 64
"""How many of the special tokens are tried; a vocabulary may have thousands of one kind."""
HARD_TEXTS = (
    "",
    " ",
    "\n",
    "a" * 5000,
    "A" * 3000 + "b" * 3000,
    " " * 3000 + "x",
    "\n" * 500 + "\t" * 500 + " \r\n" * 500,
    "0123456789" * 300,
    "1 22 333 4444 55555 666666 1,000,000.00 1e-9 0x7fff",
    "-" * 2000 + "=" * 2000 + "!?" * 1000,
    "漢字かな交じり文。中文文本没有空格" * 100,
    "한국어 텍스트 ไทยไม่มีช่องว่าง العربية עברית हिन्दी " * 30,
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 e\u0301 \u00e9 \u200b\ufeff\u00a0\u2028\u3000" * 20,
    "I'm you'll HE'D they'Re don't WON'T 'S 's''t",
    "naïve façade Straße ǅ ﬁ ½ ² Ⅷ ① \U0001d4b3 𐍈 \U0010ffff",
    "def f(x):\n    return {\n        'a': [x**2, -1],\n    }  # comment\r\n\r\n",
    'https://example.org/a_b-c?d=%20e&f#g <div class="x">\\u00e9</div>',
    "\x00\x01\x7f\u0080\u009f",
)


class FastTokenizer:
    """gigatoken's ids of texts, without what a template adds."""

    def __init__(self, definition: bytes, threads: int) -> None:
        """Load the tokenizer that a `tokenizer.json` defines.

        Raises:
            ImportError: gigatoken is not installed.
            ValueError: it does not know such a tokenizer.
        """
        # The library's threads are made at their first use, by this.
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        import gigatoken

        self._library, self._definition, self._threads = gigatoken, definition, threads
        self._process = psutil.Process()
        self.name = f"gigatoken {version('gigatoken')}"
        self._load()

    def _load(self) -> None:
        try:
            self._tokenizer = self._library.Tokenizer.from_json(self._definition)
        except Exception as error:  # the Rust library raises nothing narrower
            raise ValueError(str(error).splitlines()[0]) from error
        self._memory_at_first: int | None = None

    def encode(self, texts: Sequence[str]) -> Ids:
        """Give the ids of each text."""
        encoded = self._tokenizer.encode_batch(list(texts), parallel=self._threads > 1)
        # An awkward array of rows; its layout has the two arrays that it is made of.
        ends = np.asarray(encoded.layout.offsets.data)
        flat = np.asarray(encoded.layout.content.data)[ends[0] : ends[-1]]
        lengths = np.diff(ends)
        assert lengths.size == len(texts), "gigatoken must answer every text"
        self._forget_if_large()
        return Ids(flat, lengths)

    def _forget_if_large(self) -> None:
        memory = self._process.memory_info().rss
        if self._memory_at_first is None:
            self._memory_at_first = memory
        if memory > max(MEMORY_BYTES, self._memory_at_first + CACHE_BYTES):
            del self._tokenizer
            _give_memory_back()
            self._load()


def _give_memory_back() -> None:
    """Ask the C library to give freed memory back, where it can be asked: it keeps most of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def hard_texts(special: Sequence[str]) -> list[str]:
    """Give texts on which tokenizers have differed, and the special tokens within text."""
    some = special[:NUM_SPECIAL]
    within = [f"a{token}b {token} c\n{token}{token}" for token in some]
    return [*HARD_TEXTS, *within, " ".join(some)]


def first_difference(fast: Ids, true: Ids, frame: Frame) -> int | None:
    """Find the first text whose ids differ, once the template is put around the fast ones."""
    assert fast.lengths.size == true.lengths.size, "both answer every text"
    for index, (left, right) in enumerate(zip(_rows(fast), _rows(true), strict=True)):
        if [*frame.before, *left.tolist(), *frame.after] != right.tolist():
            return index
    return None


def _rows(ids: Ids) -> Iterator[np.ndarray]:
    return iter(np.split(ids.flat, np.cumsum(ids.lengths)[:-1]))
