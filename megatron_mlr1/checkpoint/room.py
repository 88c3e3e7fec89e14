"""Room on the disk for a checkpoint, and what makes room: removing one."""

import os
import shutil
from pathlib import Path

from megatron_mlr1.errors import MachineError


def refuse_little_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk would not take.

    A disk that does not say how large it is, as some remote ones, is taken at its word later.

    Args:
        folder: where checkpoints go; it, or the nearest folder above that is there, is asked.
        needed: bytes of one checkpoint.

    Raises:
        MachineError: there is less room.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    room = shutil.disk_usage(there)
    if room.total > 0 and room.free < needed:
        raise MachineError(
            f"{folder} has room for {_short(room.free)}, and a checkpoint of this run takes "
            f"{_short(needed)} or more. Make room and give the same command again, or name a "
            "folder on a larger disk with --save."
        )


def remove(folder: Path) -> bool:
    """Remove a checkpoint, or a link to one; tell whether it is gone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)


def _short(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
