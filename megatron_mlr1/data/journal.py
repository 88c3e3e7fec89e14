"""`PREFIX.journal.json`: how far a run that makes corpora has come, so that it can go on.

It is written after what it tells of lies on the disk, by a rename, and goes when the corpora have
their names. So whatever lies beside it, the first so many bytes of each unfinished file are right.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_mlr1.data.disk import names_the_file, write_json
from megatron_mlr1.data.index import Counts
from megatron_mlr1.errors import ConfigError, DataError, Mlr1Error

FORMAT = 1
Phase = Literal["encode", "shuffle", "publish"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """A point from which a run can go on."""

    plan: Mapping[str, Any]
    """All that decides the bytes, as `preprocess.prepare` gathers it."""
    phase: Phase = "encode"
    position: Mapping[str, int] | None = None
    """Where in the input; None: at its begin."""
    counts: Mapping[str, Counts] = field(default_factory=dict)
    """By JSON key: what its unfinished corpus holds."""
    records: int = 0
    """Records read, rejected ones too."""
    rejected: int = 0
    rejected_bytes: int = 0
    """Size of the file of rejected records."""
    stored_bytes: int = 0
    """Bytes of the input files that were read."""
    engine: str | None = None
    """The library that made the ids of the last batch, with its version."""
    corpora: Mapping[str, Any] = field(default_factory=dict)
    """In the phase `publish`, by JSON key: the record of the corpus."""
    format: int = FORMAT


class StoppedError(Exception):
    """A signal asked the run to stop, and its journal is written."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stop:
    """Whether a signal asked to stop; `ask` is its handler."""

    def __init__(self) -> None:
        self.number: int | None = None

    def ask(self, number: int, frame: object) -> None:
        """Note the signal; the second one ends the program at once."""
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def obey(self) -> None:
        """Stop here if a signal asked for it.

        Raises:
            Stopped: it did.
        """
        if self.number is not None:
            raise StoppedError(self.number)


def journal_path(prefix: str) -> Path:
    """Name the journal of the corpora `PREFIX_KEY_document`."""
    return Path(f"{prefix}.journal.json")


def digest_of(plan: Mapping[str, Any]) -> str:
    """Digest all that decides the bytes, in hexadecimal."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def write_journal(prefix: str, journal: Journal) -> None:
    """Write the journal; what it tells of must lie on the disk.

    Raises:
        MachineError: the disk is full or failed.
    """
    write_json(journal_path(prefix), asdict(journal))


def read_journal(prefix: str) -> Journal | None:
    """Read the journal that an earlier run left; None: there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = journal_path(prefix)
    if not path.exists():
        return None
    with names_the_file(path, DataError):
        data = path.read_bytes()
    try:
        fields = json.loads(data)
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {fields['format']}, known is {FORMAT}")
        if not isinstance(fields["plan"], dict):
            raise TypeError("its plan is none")
        counts = {key: Counts(**parts) for key, parts in fields["counts"].items()}
        return Journal(**(fields | {"counts": counts}))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is no journal that this version knows ({error}). Begin anew with --overwrite."
        ) from error


def refuse_other_plan(prefix: str, journal: Journal, plan: Mapping[str, Any]) -> None:
    """Refuse to go on with another plan than the journal's.

    Records may be skipped from here on where the journal's run would have stopped at the first.

    Raises:
        ConfigError: they differ; names how.
    """
    old = dict(journal.plan)
    if old.get("on_error") == "stop" and plan["on_error"] == "skip":
        old["on_error"] = "skip"
    differing = [name for name in plan if old.get(name) != plan[name]]
    if differing:
        what = "; ".join(_difference(name, old.get(name), plan[name]) for name in differing)
        raise ConfigError(
            f"{journal_path(prefix)} is of a run that was stopped and differs from this command: "
            f"{what}. Give its command again to go on, or say --overwrite to begin anew."
        )


def _difference(name: str, old: Any, new: Any) -> str:
    if name == "inputs" and isinstance(old, list):
        for before, now in zip(old, new, strict=False):
            if before != now:
                return f"input {now['path']} is not what it was ({before['path']})"
        return f"{len(new)} pieces of input where it had {len(old)}"
    return f"{name} is {new!r} where it had {old!r}"


@contextmanager
def only_run(prefix: str) -> Iterator[None]:
    """Keep other runs from the same output as long as this one goes on.

    Raises:
        ConfigError: another one goes on.
        MachineError: the folder is missing or cannot be written.
    """
    path = Path(f"{prefix}.journal.lock")
    descriptor = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    """Take the lock, and give its descriptor.

    A run that ends removes its file. Whoever had opened that before locks a file without a name,
    which keeps nobody out, and looks again.
    """
    while True:
        with names_the_file(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError(
                f"{path}: another run writes these corpora at this moment. Let it end."
            ) from error
        except OSError:
            return descriptor  # a file system without locks: nobody can be kept out
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def goes_on(error: Mlr1Error, prefix: str) -> Mlr1Error:
    """Add to an error that what is done so far is kept."""
    return type(error)(
        f"{error} What was done before is kept beside {journal_path(prefix)}, and the same command "
        "goes on from there; for a bad record it may say --on-error skip too."
    )
