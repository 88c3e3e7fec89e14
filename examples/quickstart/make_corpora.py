"""Write three corpora of JSON lines from text that comes with every Python.

code      the standard library's sources, without their docstrings
docs      those docstrings, and the language reference that `help()` shows
licences  the licences of Python and of every installed package, no paragraph twice
"""

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from megatron_mlr1.errors import DataError, Mlr1Error

SKIPPED_FOLDERS = frozenset(
    [
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    ]
)
"""Folders of tests, generated tables and other people's packages."""

LICENCE_NAMES = ("COPYING", "LICENCE", "LICENSE", "NOTICE")
MIN_CHARACTERS = 200
"""Shorter documents teach little."""
LICENCE_CHARACTERS = 4_000
"""A document of licences is closed at the first paragraph beyond this."""
MIN_CORPUS_CHARACTERS = 50_000


def main() -> int:
    """Write the corpora and say how large they are; give the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    output: Path = parser.parse_args().output
    try:
        modules = [split(name, source) for name, source in library_sources()]
        corpora = {
            "code": [code for code, _ in modules],
            "docs": [*(docs for _, docs in modules), *help_topics()],
            "licences": list(licences()),
        }
        for name, texts in corpora.items():
            write(output / f"{name}.jsonl", texts)
    except Mlr1Error as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def library_sources() -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the source of each module of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        # `_sysconfigdata` lists the paths and flags of one build.
        if not (SKIPPED_FOLDERS.intersection(parts) or parts[-1].startswith("_sysconfigdata")):
            with tokenize.open(path) as stream:
                yield ".".join(parts), stream.read()


def split(module: str, source: str) -> tuple[str, str]:
    """Part a module into its code without docstrings, and its docstrings under their names."""
    lines = source.splitlines(keepends=True)
    sections: list[str] = []
    for name, node in documented(ast.parse(source), module):
        sections.append(f"{name}\n\n{ast.get_docstring(node)}")
        string = node.body[0]
        # An empty body would not be Python, so a docstring that stands alone stays.
        if len(node.body) > 1 and string.end_lineno is not None:
            for number in range(string.lineno - 1, string.end_lineno):
                lines[number] = ""
    return "".join(lines), "\n\n\n".join(sections)


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    """Yield what has a docstring, with its dotted name, in the order of the source."""
    if ast.get_docstring(node):
        yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from documented(child, f"{name}.{child.name}")


def help_topics() -> Iterable[str]:
    """Give the language reference that `help()` shows."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def licences() -> Iterator[str]:
    """Yield documents of the paragraphs of all licences, each paragraph once."""
    seen: set[str] = set()
    document = ""
    for text in licence_files():
        for paragraph in text.replace("\r\n", "\n").split("\n\n"):
            words = " ".join(paragraph.split())
            if not words or words in seen:
                continue
            seen.add(words)
            document += paragraph.strip("\n") + "\n\n"
            if len(document) > LICENCE_CHARACTERS:
                yield document
                document = ""
    yield document


def licence_files() -> Iterator[str]:
    """Yield the text of each licence file of this Python and of its packages."""
    paths = {Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"}
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            if file.name.upper().startswith(LICENCE_NAMES) and file.suffix in ("", ".txt", ".md"):
                paths.add(Path(str(distribution.locate_file(file))))
    for path in sorted(paths):
        if path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")


def write(path: Path, texts: Iterable[str]) -> None:
    """Write a corpus, in an order that depends on the texts alone.

    Raises:
        DataError: this Python has too little such text.
    """
    kept = {text for text in texts if len(text) >= MIN_CHARACTERS}
    num_characters = sum(map(len, kept))
    if num_characters < MIN_CORPUS_CHARACTERS:
        raise DataError(
            f"{path.stem}: {sys.executable} has {num_characters:,} characters of it, and a corpus "
            f"needs {MIN_CORPUS_CHARACTERS:,}. Take a Python that has its standard library as "
            "files, as python.org's and those of pyenv, conda and the Linux distributions do."
        )
    ordered = sorted(kept, key=lambda text: hashlib.sha256(text.encode()).digest())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ordered))
    print(f"{path}: {len(ordered):,} documents, {num_characters:,} characters")


if __name__ == "__main__":
    sys.exit(main())
