"""Write text to measure with, made of what lies beside every Python, and say what it is like.

The sources of the standard library and of installed packages, and where there is such a thing the
system's headers, documentation and manual pages in several languages. Files come in a random order
that is always the same, as documents of 1,500 to 20,000 characters. No line of more than 40
characters comes twice. When all files are read they are read again, and each time words of five
letters and more that are not among the common ones get other letters, vowels for vowels: a
tokenizer that remembers words goes on to meet new ones.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Final

from megatron_mlr1.ending import clean_exit

PLACES: Final = (
    *dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    "/usr/share",
    "/usr/include",
)
NO_TEXT: Final = (".so", ".pyc", ".a", ".mo", ".bc", ".whl", ".zip", ".jar", ".png", ".ttf")
FILE_BYTES: Final = 200_000
"""More of one file is not read; it would mostly be a table."""
DOCUMENT_CHARACTERS: Final = (1500, 3000, 6000, 20_000)
MIN_CHARACTERS: Final = 200
LONG_LINE: Final = 40
WORD: Final = re.compile("[A-Za-z]{5,}")
SAMPLE: Final = re.compile(r"\b[Kk]\w+")
"""Some of the words, to see how many are new."""
COMMON: Final = 20
"""A word that comes more often in the first documents stays as it is."""
COUNTED: Final = 8_000_000
"""Characters in which words are counted."""


class Text:
    """Documents without end, no long line twice."""

    def __init__(self) -> None:
        """Find the files; reading comes with the documents."""
        paths = (
            os.path.join(folder, name)
            for place in PLACES
            for folder, _, names in os.walk(place)
            for name in names
            if not name.endswith(NO_TEXT)
        )
        self._paths = sorted(paths, key=lambda path: hashlib.md5(path.encode()).digest())
        self._met = bytearray(1 << 27)
        """A place for each checksum of a line. Two lines may share one; one of them is left out."""
        self._counts: Counter[str] = Counter()
        self._rounds = 0
        self._long_lines = self._left_out = 0
        self._sample: set[str] = set()
        self._in_sample = 0

    def description(self) -> str:
        """Say what all documents so far are like."""
        left_out = self._left_out / max(self._long_lines, 1)
        new_words = len(self._sample) / max(self._in_sample, 1)
        return (
            f"reading {self._rounds} of the files; {left_out:.0%} of the lines of more than "
            f"{LONG_LINE} characters were left out because they had come before; {new_words:.1%} "
            "of its words had not come before (those that begin with k)"
        )

    def documents(self) -> Iterator[str]:
        """Yield documents."""
        counted = 0
        for turn in count():
            self._rounds = turn + 1
            vary = self._variation(turn)
            before = self._long_lines - self._left_out
            for path in self._paths:
                text = _read(path)
                if text is None:
                    continue
                if counted < COUNTED:
                    counted += len(text)
                    self._counts.update(WORD.findall(text))
                yield from self._cut(self._without_known_lines(vary(text)), len(text))
            if self._long_lines - self._left_out == before:
                raise SystemExit(f"{', '.join(PLACES)} hold no text to measure with")

    def _variation(self, turn: int) -> Callable[[str], str]:
        if turn == 0:
            return lambda text: text
        common = {word for word, times in self._counts.items() if times > COMMON}
        table: dict[int, int] = {}
        for letters in ("aeiou", "bcdfghjklmnpqrstvwxyz"):
            others = "".join(random.Random(turn).sample(letters, len(letters)))
            table |= str.maketrans(letters + letters.upper(), others + others.upper())

        def other(match: re.Match[str]) -> str:
            word = match[0]
            return word if word in common else word.translate(table)

        return lambda text: WORD.sub(other, text)

    def _without_known_lines(self, text: str) -> str:
        kept = []
        for line in text.splitlines(keepends=True):
            if len(line) > LONG_LINE:
                place = zlib.crc32(line.encode()) & (len(self._met) - 1)
                self._long_lines += 1
                if self._met[place]:
                    self._left_out += 1
                    continue
                self._met[place] = 1
            kept.append(line)
        return "".join(kept)

    def _cut(self, text: str, seed: int) -> Iterator[str]:
        step = random.Random(seed).choice(DOCUMENT_CHARACTERS)
        for begin in range(0, len(text), step):
            document = text[begin : begin + step]
            if len(document) >= MIN_CHARACTERS:
                words = SAMPLE.findall(document)
                self._in_sample += len(words)
                self._sample.update(words)
                yield document


def _read(path: str) -> str | None:
    """Read the beginning of a file; None where it is no text, or cannot be read."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            content = file.read(FILE_BYTES)
    except (OSError, EOFError, zlib.error):
        return None
    if b"\0" in content or os.path.islink(path):
        return None
    if len(content) == FILE_BYTES:
        content = content[: content.rfind(b"\n") + 1]
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def write_files(folder: Path, sizes: list[int]) -> dict[int, str]:
    """Write `one.jsonl` of one document and `SIZE.jsonl` of so many MB; tell what they are."""
    text = Text()
    about: dict[int, str] = {}
    written = num_documents = 0
    files = {size: (folder / f"{size}.jsonl").open("wb") for size in sorted(sizes)}
    for number, document in enumerate(text.documents()):
        record = {"id": number, "text": document}
        line = json.dumps(record, ensure_ascii=bool(number % 2)).encode() + b"\n"
        if number == 0:
            (folder / "one.jsonl").write_bytes(line)
        written, num_documents = written + len(line), num_documents + 1
        for size, file in list(files.items()):
            file.write(line)
            if written >= size * 1_000_000:
                files.pop(size).close()
                about[size] = f"{num_documents:,} documents; {text.description()}"
        if not files:
            break
    return about


def main() -> None:
    """Write, and print a sentence for each size as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="gets SIZE.jsonl and one.jsonl")
    parser.add_argument("--mb", type=int, nargs="+", required=True, help="sizes of the files")
    options = parser.parse_args()
    print(json.dumps(write_files(options.folder, options.mb)))


if __name__ == "__main__":
    with clean_exit():
        main()
