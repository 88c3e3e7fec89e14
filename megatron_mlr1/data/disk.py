"""Files that are whole or not there: what every writer of corpora does with the disk."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_mlr1.errors import ConfigError, DataError, MachineError

BLOCK_BYTES = 1 << 19
"""Read at once; a multiple of the size of every number in a corpus."""


def refuse_nameless(prefix: str) -> None:
    """Refuse a prefix that ends in a folder: its files would be hidden, and no corpus of a name.

    Raises:
        ConfigError: it is empty, or ends in `/`, `.` or `..`.
    """
    if os.path.basename(prefix) in ("", ".", ".."):
        raise ConfigError(
            f"--output-prefix is {prefix!r}, which names no file; it is a folder and the begin of "
            f"the names of files, such as {os.path.join(prefix, 'NAME')}. Add the name."
        )


def refuse_existing(*paths: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: one of the paths exists.
        MachineError: it cannot be found out, since its name is too long for one.
    """
    for path in paths:
        with names_the_file(path):
            is_there = path.exists()
        if is_there:
            raise ConfigError(
                f"{path} is there already, finished or from a run that goes on or was killed. "
                "Choose another --output-prefix, remove it, or say --overwrite."
            )


def refuse_folders(*paths: Path) -> None:
    """Refuse to write files where folders are: nothing overwrites those.

    Raises:
        ConfigError: one of the paths is a folder.
        MachineError: it cannot be found out, since its name is too long for one.
    """
    for path in paths:
        with names_the_file(path):
            is_folder = path.is_dir()
        if is_folder:
            raise ConfigError(
                f"{path} is a folder, and a file of this name is to be written. Choose another "
                "--output-prefix, or move the folder away."
            )


def refuse_little_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk would not take.

    Args:
        folder: where it is to be written.
        needed: bytes.

    Raises:
        MachineError: the folder is not there, or has less room.
    """
    with names_the_file(folder):
        if not folder.is_dir():
            code = errno.ENOTDIR if folder.exists() else errno.ENOENT
            raise _no_folder(folder, os.strerror(code))
        room = shutil.disk_usage(folder)
    if room.free < needed:
        raise MachineError(
            f"{folder} has room for {_size(room.free)}, and {_size(needed)} are to be written. "
            "Make room, or choose another --output-prefix."
        )


def _size(num_bytes: int) -> str:
    """Write a size in the largest unit of which there is one: a small one is not rounded to 0."""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= power:
            return f"{num_bytes / power:,.2f} {unit}"
    return f"{num_bytes} bytes"


def file_size(path: Path) -> int:
    """Give the bytes of a file that is to be read.

    Raises:
        DataError: it is not there, or no file: a folder, a pipe or a device.
    """
    with names_the_file(path, DataError):
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        return found.st_size


def remove(paths: Iterable[Path]) -> None:
    """Remove files that may be there, as far as that goes.

    It is for the end of what failed: what cannot be removed must not hide why.
    """
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


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
        why = error.strerror or str(error)
        if kind is DataError:
            raise DataError(
                f"{path}: {why}, so it cannot be read. Name what is there and may be read, or make "
                "it again."
            ) from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not path.parent.is_dir():
            raise _no_folder(path.parent, why) from error
        raise MachineError(
            f"{path}: {why}, so it cannot be written. Its folder must be there, may be written and "
            "have room; mend that and run again."
        ) from error


def _no_folder(folder: Path, why: str) -> MachineError:
    return MachineError(
        f"{folder}: {why}, so nothing can be written there. Make that folder, or name another."
    )


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
        except BaseException:
            remove([partial])  # which may fail like the write, and must not hide its error
            raise
        flush_folder_to_disk(path.parent)


@contextmanager
def whole_file(path: Path, flag: str) -> Iterator[BinaryIO]:
    """Open a file that gets its name when all of it is written, over one that is there.

    Args:
        path: the file.
        flag: which names it, for the messages.

    Raises:
        ConfigError: it is a folder, or no name.
        MachineError: the folder is missing or cannot be written, or the disk is full.
    """
    with names_the_file(path):
        if path.name in ("", "..") or path.is_dir():
            raise ConfigError(f"{flag} is {str(path)!r}, a folder; name a file in it.")
        partial = path.with_name(f"{path.name}.partial")
        try:
            with partial.open("wb") as file:
                yield file
                flush_to_disk(file)
            partial.replace(path)
        except BaseException:
            remove([partial])
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
