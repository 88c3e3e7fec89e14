"""`PREFIX.rejected.jsonl`: the records that were left out, each with its place and its reason."""

import base64
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from megatron_mlr1.data.disk import flush_folder_to_disk, flush_to_disk, names_the_file, reopen
from megatron_mlr1.data.encode import Rejected


class Quarantine:
    """The file of rejected records of one run; it has the name `.partial` until it is whole."""

    def __init__(self, prefix: str, num_bytes: int) -> None:
        """Open the file of the run `prefix` behind its first `num_bytes` bytes.

        Raises:
            DataError: it has fewer.
            MachineError: the folder is missing or cannot be written.
        """
        self._path, self._partial = rejected_paths(prefix)
        self.num_bytes = num_bytes
        with names_the_file(self._partial):
            self._file = reopen(self._partial, num_bytes)

    def write(self, rejected: Iterable[Rejected]) -> None:
        """Append records: `where`, `reason` and `raw`, or `raw_base64` where it is not UTF-8.

        Raises:
            MachineError: the disk is full or failed.
        """
        for record in rejected:
            fields = {"where": record.where, "reason": record.reason}
            try:
                fields["raw"] = record.raw.decode()
            except UnicodeDecodeError:
                fields["raw_base64"] = base64.b64encode(record.raw).decode()
            line = json.dumps(fields, ensure_ascii=False).encode() + b"\n"
            with names_the_file(self._partial):
                self._file.write(line)
            self.num_bytes += len(line)

    def flush(self) -> None:
        """Force all to the disk.

        Raises:
            MachineError: the disk is full or failed.
        """
        with names_the_file(self._partial):
            flush_to_disk(self._file)

    def close(self) -> None:
        """Close, and leave what is written."""
        with suppress(OSError):  # closing flushes, which fails again where the disk is full
            self._file.close()


def rejected_paths(prefix: str) -> tuple[Path, Path]:
    """Name the file of the rejected records of a run, and the unfinished one."""
    return Path(f"{prefix}.rejected.jsonl"), Path(f"{prefix}.rejected.jsonl.partial")


def publish_rejected(prefix: str) -> None:
    """Give the file its name, or remove it where nothing was rejected; may be called again.

    Raises:
        MachineError: the rename failed.
    """
    path, partial = rejected_paths(prefix)
    with names_the_file(path):
        if partial.exists():
            if partial.stat().st_size:
                partial.replace(path)
            else:
                path.unlink(missing_ok=True)  # of an earlier run that was overwritten
                partial.unlink()
            flush_folder_to_disk(path.parent)
