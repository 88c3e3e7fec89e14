"""The roll of a pool: who joined it, in what order, and so which teacher it has.

Each replica that joins adds a file, `00000007.joined`, one number behind the newest. A file gets
its name by a hard link, so it is whole when it is there, and of those who try for one number a
single one succeeds, on NFS too. The newest counts. The older ones keep their numbers taken for
whoever read the roll a while ago; those that are `KEPT` numbers behind are removed.
"""

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

KEPT: Final = 256
"""Entries that stay."""
MAX_ENTRY_BYTES: Final = 4096
LOOK_AGAIN_S: Final = 0.02
_NAME: Final = re.compile(r"(\d{8,15})\.joined")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One joining."""

    number: int
    """Of the file, from 1."""
    name: str
    """The replica's."""
    fingerprint: str
    """The teacher's, 32 hex digits; empty for a file that is no entry of this version."""
    expires: float
    """Seconds since 1970. Until then the entry stands for the lease that its writer will hold."""


def newest(folder: Path) -> Entry | None:
    """Read who joined last; None where nobody ever did.

    Raises:
        OSError: the folder or the file cannot be read.
    """
    while numbers := _numbers(folder):
        number = max(numbers)
        # Removed in the meantime means that a newer one is there, which NFS may show later.
        with suppress(FileNotFoundError):
            return _read(_path(folder, number), number)
        time.sleep(LOOK_AGAIN_S)
    return None


def append(folder: Path, entry: Entry) -> bool:
    """Add an entry behind the newest, on the disk; False if somebody else was faster.

    Entries that are `KEPT` numbers behind the newest are removed.

    Raises:
        OSError: the folder cannot be written, or has no hard links.
    """
    path = _path(folder, entry.number)
    partial = folder / f"{uuid4().hex}.partial"
    try:
        with partial.open("x", encoding="utf-8") as file:
            json.dump(asdict(entry), file)
            file.flush()
            os.fsync(file.fileno())
        if not _link(partial, path):
            return False
    finally:
        partial.unlink(missing_ok=True)
    numbers = _numbers(folder)
    oldest = max(numbers, default=0) - KEPT + 1
    for number in numbers:
        if number < oldest:
            _path(folder, number).unlink(missing_ok=True)
    return entry.number >= oldest  # else the number was taken before, and removed


def _link(partial: Path, path: Path) -> bool:
    try:
        os.link(partial, path)
    except FileExistsError:
        # An NFS client that lost the reply asks again and meets its own link.
        return partial.stat().st_nlink == 2
    return True


def _numbers(folder: Path) -> list[int]:
    matches = (_NAME.fullmatch(name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in matches if match)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08}.joined"


def _read(path: Path, number: int) -> Entry:
    with path.open("rb") as file:
        text = file.read(MAX_ENTRY_BYTES)
    try:
        entry = Entry(**json.loads(text))
        if entry.number == number and type(entry.expires) is float:
            return entry
    except (ValueError, TypeError, RecursionError):
        pass
    return Entry(number=number, name="", fingerprint="", expires=0.0)
