"""An output folder that appears whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mlr1.errors import CheckpointError


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file durably."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a small file durably; whoever reads it finds the old text or the new, never less."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        write_text(partial, text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_folder(path.parent)


@contextmanager
def whole_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write in beside `target`; it takes that name when the block ends well.

    Args:
        target: the folder to be made.
        overwrite: replace what is there already.

    Raises:
        CheckpointError: there is something at `target`, or the disk would not take the folder.
    """
    target = target.absolute()
    if not overwrite and _is_occupied(target):
        raise CheckpointError(
            f"{target} exists and is not empty; the output must be a new folder. Name another one, "
            "or give --overwrite to replace it."
        )
    # No process's number: two containers that share the disk may have the same.
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for folder, _, _ in os.walk(partial):
            fsync_folder(Path(folder))
        _put_in_place(partial, target)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written: {error}. Nothing was left there; make room or choose "
            "a folder that can be written, then run the conversion again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_occupied(target: Path) -> bool:
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


def _put_in_place(partial: Path, target: Path) -> None:
    former = target.with_name(f".{target.name}.former-{secrets.token_hex(4)}")
    if _is_occupied(target):
        target.rename(former)
    partial.rename(target)
    fsync_folder(target.parent)
    if former.is_dir():
        shutil.rmtree(former)
    else:
        former.unlink(missing_ok=True)
