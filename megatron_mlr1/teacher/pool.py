"""Which replicas there are: leases in a folder that all machines share, or a list of addresses.

A replica keeps `NAME.lease` in the folder, rewritten by an atomic rename every third of its life
and removed when the replica drains. A lease that has run out is not read any more, and is swept by
the replicas. Clocks of the machines may differ by less than `LEASE_S`. A pool has one teacher: that
of its living replicas, and while one joins, the one that the newest entry of `roll` names.
"""

import json
import logging
import os
import re
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Final, Protocol

from megatron_mlr1.errors import MachineError, TeacherError
from megatron_mlr1.teacher import roll

LEASE_S: Final = 15.0
"""Life of a lease from its last renewal."""
RESCAN_S: Final = 2.0
"""Time between two looks at a pool."""
SWEEP_AFTER_S: Final = 60.0
"""A lease that ran out so long ago belongs to nobody."""
MAX_LEASE_BYTES: Final = 4096
_SUFFIX: Final = ".lease"
_PARTIAL: Final = ".partial"
HOST: Final = re.compile(r"\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+")
"""A name, an IPv4 address, or an IPv6 address in brackets."""
_ADDRESS: Final = re.compile(rf"tcp://({HOST.pattern}):(\d{{1,5}})|ipc://.+")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A replica as its students see it."""

    name: str
    """The replica's own: host, process and place."""
    endpoint: str
    """A ZeroMQ address to connect to."""
    fingerprint: str = ""
    """The teacher's, 32 hex digits; empty where only a connection will tell."""
    public_key: str = ""
    """The pool's CURVE key, 40 characters; empty where the pool has none or the lease is from a
    list. A student compares it with the key file it trusts, and does not take it from here."""
    expires: float = float("inf")
    """Seconds since 1970."""


class Pool(Protocol):
    """A set of replicas that changes while one looks."""

    def leases(self) -> list[Lease]:
        """Give the replicas that are there now, by name."""

    def remarks(self) -> str:
        """Say to a person why `leases` may give fewer than are expected; "" for no reason."""


@dataclass(frozen=True, slots=True)
class AddressPool:
    """Replicas at fixed addresses; one that does not answer is the student's to find out."""

    addresses: tuple[str, ...]

    def leases(self) -> list[Lease]:
        """Give one lease for each address."""
        return [Lease(name=address, endpoint=address) for address in self.addresses]

    def remarks(self) -> str:
        """Give "": a list has no leases that could run out."""
        return ""


@dataclass(frozen=True, slots=True)
class FolderPool:
    """Replicas that hold a lease in a folder."""

    folder: Path

    def leases(self) -> list[Lease]:
        """Read the leases that have not run out; a file that is no lease is passed over.

        Raises:
            MachineError: the folder cannot be read.
        """
        now = time.time()
        found = (_read(path) for path in _lease_files(self.folder))
        return [lease for lease in found if lease is not None and lease.expires > now]

    def remarks(self) -> str:
        """Say that there is no lease, how many have run out, and how many files are none.

        Raises:
            MachineError: the folder cannot be read.
        """
        now = time.time()
        found = [_read(path) for path in _lease_files(self.folder)]
        ages_s = [now - lease.expires for lease in found if lease and lease.expires <= now]
        says = [] if found else [f"{self.folder} holds no lease: no replica has come, or all left."]
        if ages_s:
            says.append(
                f"Leases in {self.folder} that have run out: {len(ages_s)}, the newest "
                f"{min(ages_s):.0f} s ago by the clock of this machine; their replicas are gone, "
                f"or clocks differ by more than {LEASE_S:.0f} s."
            )
        if None in found:
            says.append(
                f"Files in {self.folder} that are no lease of this version: {found.count(None)}."
            )
        return " ".join(says)


def open_pool(where: str) -> Pool:
    """Open a pool by its folder, or by `tcp://HOST:PORT[,HOST:PORT...]`.

    Raises:
        TeacherError: an address is none, or the folder is missing.
    """
    if "://" not in where:
        folder = Path(where)
        if not where or not folder.is_dir():
            raise TeacherError(
                f"{where!r} is no folder; a pool is the folder that tools/serve_teacher.py was "
                "given by --pool, or tcp://HOST:PORT,HOST:PORT. Make it, or name the right one."
            )
        return FolderPool(folder)
    scheme = where.split("://", 1)[0]
    addresses = [
        part if "://" in part else f"{scheme}://{part}" for part in where.split(",") if part
    ]
    for address in addresses:
        match = _ADDRESS.fullmatch(address)
        if match is None or (match[2] and not 0 < int(match[2]) < 65536):
            raise TeacherError(
                f"{address} is no address of a replica; write tcp://HOST:PORT[,HOST:PORT...]."
            )
    return AddressPool(tuple(addresses))


@cache
def needs_ipv6(endpoint: str) -> bool:
    """Say whether a socket must be set to IPv6 to reach an endpoint.

    ZeroMQ tries one kind of address alone, so a name that has both, as `localhost` often does, is
    reached by IPv4. A name is looked up once in a process: a name server that has gone must not
    stop a client whose connections live.
    """
    match = _ADDRESS.fullmatch(endpoint)
    if match is None or match[1] is None:
        return False
    try:
        found = socket.getaddrinfo(match[1].strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return socket.AF_INET not in {family for family, *_ in found}


def join(folder: Path, name: str, fingerprint: str) -> None:
    """Join a pool, before the first lease; of several teachers that come at once one is let in.

    Every joining is an entry of the roll, and to write one wins a race. So whoever has looked at
    the pool and found it free knows, once the entry is written, that nobody came in between. The
    entry stands for the replica for `LEASE_S`, in which it must write its lease.

    Args:
        folder: the pool; is made where it is missing.
        name: the replica's.
        fingerprint: its teacher's.

    Raises:
        TeacherError: the pool has another teacher.
        MachineError: the folder cannot be read or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            last = roll.newest(folder)  # before the leases: who joined before it has one by now
            _refuse_other_teacher(folder, last, fingerprint)
            entry = roll.Entry(
                number=1 if last is None else last.number + 1,
                name=name,
                fingerprint=fingerprint,
                expires=time.time() + LEASE_S,
            )
            if roll.append(folder, entry):
                return
    except OSError as error:
        raise _cannot(folder, error) from error


def _refuse_other_teacher(folder: Path, last: roll.Entry | None, fingerprint: str) -> None:
    there: list[Lease | roll.Entry] = list(FolderPool(folder).leases())
    if last is not None and last.expires > time.time():
        there.append(last)
    for one in there:
        if one.fingerprint != fingerprint:
            raise TeacherError(
                f"{folder} has the replica {one.name} of the teacher {one.fingerprint}, and "
                f"this one is {fingerprint} (weights, tokenizer, precision, kind of device and "
                "versions make it). A pool has one teacher. Name another folder by --pool, or "
                f"stop its replicas; {LEASE_S:.0f} s after the last one the folder is free."
            )


def make_pool(folder: Path) -> None:
    """Make a pool's folder where it is missing, and see whether it can be written.

    Raises:
        MachineError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=_PARTIAL) as file:
            file.write(b"?")
            link = Path(f"{file.name}{_PARTIAL}")
            os.link(file.name, link)
            link.unlink()
    except OSError as error:
        raise _cannot(folder, error) from error


class LeaseKeeper:
    """Keeps one replica's lease fresh; called from time to time by the replica's own loop."""

    def __init__(self, folder: Path, lease: Lease) -> None:
        """Prepare; nothing is written before `keep`.

        Args:
            folder: the pool.
            lease: what it says; `expires` is set anew with every renewal.

        Raises:
            MachineError: the folder cannot be made.
        """
        self._folder, self._lease = folder, lease
        self._path = folder / f"{lease.name}{_SUFFIX}"
        self._renew_at = 0.0
        self._was_kept = self._is_late = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot(folder, error) from error

    def keep(self) -> None:
        """Renew the lease where a third of its life is over, and sweep dead ones.

        Once it was kept, a folder that cannot be written is only told to the log, and tried again:
        shared storage has its bad minutes, and students that are connected need no lease.

        Raises:
            MachineError: the folder cannot be written, at the first time.
            TeacherError: another teacher joined while this one's leases had run out.
        """
        if time.monotonic() < self._renew_at:
            return
        self._renew_at = time.monotonic() + LEASE_S / 3
        try:
            self._write()
            self._leave_to_other_teacher(roll.newest(self._folder))
        except OSError as error:
            mistake = _cannot(self._folder, error)
            if not self._was_kept:
                raise mistake from error
            if not self._is_late:
                _log.warning("a lease is not renewed, so no new student comes. %s", mistake)
            self._is_late = True
            return
        if self._is_late:
            _log.warning("the lease in %s is renewed again.", self._folder)
        self._was_kept, self._is_late = True, False
        with suppress(MachineError):
            self._sweep()

    def _write(self) -> None:
        fields = asdict(self._lease) | {"expires": time.time() + LEASE_S}
        partial = self._path.with_suffix(_PARTIAL)
        try:
            partial.write_text(json.dumps(fields), "utf-8")
            partial.replace(self._path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def _leave_to_other_teacher(self, last: roll.Entry | None) -> None:
        """Give the lease up if the pool has another teacher by now.

        Whoever joined while it was silent may have looked at the leases a moment before it was
        written again; the next renewal at the latest finds that.
        """
        if last is None or last.fingerprint in ("", self._lease.fingerprint):
            return
        self.give_up()
        raise TeacherError(
            f"{self._folder} was free while this replica was silent for more than "
            f"{LEASE_S:.0f} s, and {last.name} brought the teacher {last.fingerprint}; this "
            f"one is {self._lease.fingerprint}. A pool has one teacher. Stop one of the two, or "
            "name another folder by --pool."
        )

    def give_up(self) -> None:
        """Remove the lease: no student comes any more."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        now = time.time()
        for path in _lease_files(self._folder):
            lease = _read(path)
            if lease is not None and lease.expires + SWEEP_AFTER_S < now:
                with suppress(OSError):  # another replica was faster
                    path.unlink()


def _lease_files(folder: Path) -> list[Path]:
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(_SUFFIX))
    except OSError as error:
        raise _cannot(folder, error) from error
    return [folder / name for name in names]


def _read(path: Path) -> Lease | None:
    """Read a lease; None for what is gone by now, or is no lease."""
    try:
        with path.open("rb") as file:
            fields = json.loads(file.read(MAX_LEASE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or fields.keys() != Lease.__dataclass_fields__.keys():
        return None
    expires = fields.pop("expires")
    if type(expires) is not float or not all(type(value) is str for value in fields.values()):
        return None
    if _ADDRESS.fullmatch(fields["endpoint"]) is None:
        return None
    return Lease(**fields, expires=expires)


def _cannot(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{folder}: {error.strerror}. A pool is a folder that all replicas can write, with hard "
        "links, and all students can read; mend that, or name another by --pool."
    )
