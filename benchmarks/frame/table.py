"""A table in Markdown whose rows are shown, and kept, as soon as they are measured."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.frame import machine


class Table:
    """Prints each row when it comes; with a file, what is there so far is always in it."""

    def __init__(
        self,
        title: str,
        columns: Sequence[str],
        *,
        about: Sequence[str] = (),
        notes: Sequence[str] = (),
        file: Path | None = None,
    ) -> None:
        """Show the head.

        Args:
            title: of the document.
            columns: names; one that begins with ">" is of numbers, and set to the right.
            about: paragraphs before the table.
            notes: paragraphs behind it.
            file: what keeps the table; None keeps nothing.
        """
        self._file = file
        self._notes = notes
        names = [name.removeprefix(">") for name in columns]
        rule = ["---:" if name.startswith(">") else "---" for name in columns]
        self._num_columns = len(names)
        paragraphs = [text for paragraph in about for text in (paragraph, "")]
        self._lines = [f"# {title}", "", *paragraphs, line(names), f"|{'|'.join(rule)}|"]
        print("\n".join(self._lines), flush=True)
        self._keep()

    def add(self, *cells: str) -> None:
        """Show a row and keep it; cells that are not given are empty."""
        given = [*cells, *[""] * (self._num_columns - len(cells))]
        assert len(given) == self._num_columns, f"{len(given)} cells in {self._num_columns} columns"
        self._lines.append(line(given))
        print(self._lines[-1], flush=True)
        self._keep()

    def close(self, *notes: str) -> str:
        """Show what stands behind the table; give the whole text."""
        self._notes = [*self._notes, *notes]
        print("\n".join(["", *self._notes]), flush=True)
        self._keep()
        return self._text()

    def _text(self) -> str:
        paragraphs = [text for note in self._notes for text in ("", note)]
        return "\n".join([*self._lines, *paragraphs]) + "\n"

    def _keep(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f"{self._file.name}.partial")
        partial.write_text(self._text())
        os.replace(partial, self._file)


def line(cells: Sequence[str]) -> str:
    """Write one line of a table."""
    return f"| {' | '.join(cells)} |"


def parser(doc: str | None, stem: str) -> argparse.ArgumentParser:
    """Give the parser that every benchmark has: its claim, and --save.

    Args:
        doc: the program's docstring; the first line is its claim.
        stem: name of its results.
    """
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    file = machine.results_file(stem).relative_to(machine.RESULTS.parent)
    made.add_argument("--save", action="store_true", help=f"keep the table in {file}")
    return made


def kept_in(save: bool, stem: str) -> Path | None:
    """Give the file that keeps a table, where one shall."""
    return machine.results_file(stem) if save else None


def measured_by(stem: str) -> str:
    """Say which command made a table."""
    return f"Measured by `python -m benchmarks.bench_{stem} --save`."
