"""Files that are whole or not there: what every writer of corpora does with the disk."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_mlr1.errors import ConfigError, DataError, MachineError

BLOCK_BYTES = 1 << 19
"""Read at once; a multiple of the size of every number in a corpus."""


def refuse_existing(*paths: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: one of the paths exists.
    """
    for path in paths:
        if path.exists():
            raise ConfigError(
                f"{path} is there already, finished or from a run that goes on or was killed. "
                "Choose another --output-prefix, remove it, or say --overwrite."
            )


def create(
    path: Path, mode: Literal["wb", "xb"], unfinished: list[Path], buffering: int = -1
) -> BinaryIO:
    """Open a new file, and note it among what is to be removed if the work ends early.

    It is noted first: a signal may come as soon as the file is there. What cannot be created is
    another's, or nothing, and is not noted.

    Raises:
        OSError: it is there already (with "xb"), or cannot be written.
    """
    unfinished.append(path)
    try:
        return open(path, mode, buffering)
    except OSError:
        unfinished.remove(path)
        raise


def flush_to_disk(file: BinaryIO) -> None:
    """Force what was written to a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder_to_disk(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def names_the_file(
    path: Path, kind: type[DataError] | type[MachineError] = MachineError
) -> Iterator[None]:
    """Turn an error of the operating system into ours, with the file's name.

    Raises:
        DataError, MachineError: by `kind`.
    """
    try:
        yield
    except OSError as error:
        raise kind(
            f"{path}: {error.strerror}. The corpus needs a folder that is there, may be written "
            "and has room; mend that and run again."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all, and on the disk afterwards.

    Raises:
        MachineError: the disk is full or failed.
    """
    partial = Path(f"{path}.partial")
    with names_the_file(path):
        try:
            with partial.open("wb") as file:
                file.write(json.dumps(value, indent=1).encode() + b"\n")
                flush_to_disk(file)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        flush_folder_to_disk(path.parent)


def reopen(path: Path, size: int) -> BinaryIO:
    """Open an unfinished file behind its first `size` bytes, and cut off the rest.

    Raises:
        DataError: it has fewer bytes.
        OSError: it cannot be opened.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise DataError(
            f"{path} has {found} bytes where {size} were written before the run was stopped. "
            "Begin anew with --overwrite."
        )
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def read_blocks(path: Path) -> Iterator[bytes]:
    """Read a file in blocks that end between numbers of up to 8 bytes.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block
