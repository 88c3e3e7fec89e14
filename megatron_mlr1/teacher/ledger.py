"""The ledger: for each step what was trained on, towards what, and by which objective.

Two runs with the same ledger saw the same tokens and the same targets in the same order, whatever
happened to the teachers in between. It lies beside the checkpoints, a line of JSON for each step.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import xxhash
from numpy.typing import NDArray

from megatron_mlr1.errors import DataError, MachineError
from megatron_mlr1.teacher.agreement import Branch

LEDGER: Final = "teacher.jsonl"
"""The ledger's name in the folder of the checkpoints."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One step."""

    iteration: int
    tokens: str
    """Hash of all tokens of the step, of every rank."""
    targets: str
    """Hash of all targets; of nothing where the step went on without the teacher."""
    branch: Branch


class Digest:
    """Hashes what one rank or one step holds, in the order in which it is given."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._hash = xxhash.xxh3_128()

    def add(self, arrays: Iterable[NDArray[Any]]) -> None:
        """Add arrays: their types, shapes and bytes."""
        for array in arrays:
            self._hash.update(f"{array.dtype.str}{array.shape}".encode())
            self._hash.update(memoryview(array.reshape(-1).view("u1")))

    def value(self) -> bytes:
        """Give the 16 bytes of the hash of all that was added."""
        return self._hash.digest()


def combine(digests: Sequence[bytes]) -> str:
    """Make one hash of the ranks' hashes, given in the order of the ranks."""
    return str(xxhash.xxh3_128_hexdigest(b"".join(digests)))


class Ledger:
    """The file, opened by the one rank that writes it."""

    def __init__(self, folder: Path, *, last_iteration: int) -> None:
        """Open the ledger and drop what came after `last_iteration`: it will be done again.

        Raises:
            DataError: a line is none of ours.
            MachineError: the folder cannot be written.
        """
        self._path = folder / LEDGER
        kept = [entry for entry in read(folder) if entry.iteration <= last_iteration]
        partial = folder / f"{LEDGER}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(_line(entry) for entry in kept), "utf-8")
            os.replace(partial, self._path)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        self.num_ce_only = sum(entry.branch is Branch.CE_ONLY for entry in kept)
        """Steps so far that went on without the teacher."""

    def add(self, entry: Entry) -> None:
        """Append one step, and hand it to the system before the next one begins.

        Raises:
            MachineError: the disk is full or failed.
        """
        try:
            self._file.write(_line(entry))
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        self.num_ce_only += entry.branch is Branch.CE_ONLY

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(folder: Path) -> list[Entry]:
    """Read the entries of a ledger; half a line at its end, of a killed process, is left out.

    Raises:
        DataError: a line is none of ours.
    """
    path = folder / LEDGER
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_text("utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            entries.append(Entry(**(row | {"branch": Branch(row["branch"])})))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}, line {number} is no step of a ledger: {line[:80]!r}. Remove the file to "
                "begin a new ledger; checkpoints do not need the old one."
            ) from error
    return entries


def _line(entry: Entry) -> str:
    row = {name: getattr(entry, name) for name in Entry.__slots__}
    return json.dumps(row) + "\n"


def _cannot_write(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{path}: {error.strerror}. The ledger needs a folder that is there, may be written and "
        "has room; mend that and start the run again."
    )
