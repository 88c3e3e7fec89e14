"""CURVE keys of the pool and of its students: how they are made, kept and read.

A folder of keys holds `pool.key` and `pool.key_secret`, one pair for all replicas, and under
`students/` a pair for each student. The files are those of `zmq.auth`. A replica needs the pool's
secret and the students' public keys; a student needs its own secret and the pool's public key.
"""

import errno
import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zmq
import zmq.auth
from zmq.utils import z85

from megatron_mlr1.errors import MachineError, TeacherError

POOL: Final = "pool"
STUDENTS: Final = "students"
_NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One side's CURVE keys, 40 characters of Z85 each."""

    public: bytes
    secret: bytes = field(repr=False)


def make_pair(folder: Path, name: str) -> Path:
    """Write a new pair, `NAME.key` and `NAME.key_secret` (mode 0600), and give the latter's path.

    Args:
        folder: is made where it is missing, for its owner alone.
        name: small letters, digits, `-` and `_`.

    Raises:
        TeacherError: the name is none, or one of the files is there already.
        MachineError: the folder cannot be written.
    """
    if not name or not _NAME_CHARACTERS.issuperset(name):
        raise TeacherError(
            f"{name!r} names no key; names have small letters, digits, - and _. Choose another."
        )
    public_path, secret_path = folder / f"{name}.key", folder / f"{name}.key_secret"
    public, secret = zmq.curve_keypair()
    lines = f'curve\n    public-key = "{public.decode()}"\n'
    secret_line = f'    secret-key = "{secret.decode()}"\n'
    try:
        _make_folder(folder)
        if public_path.exists():
            raise FileExistsError
        # The secret first: the public key of a pair without a secret would be of no use.
        _write_new(secret_path, f"metadata\n{lines}{secret_line}", 0o600)
        _write_new(public_path, f"metadata\n{lines}", 0o644)
    except FileExistsError as error:
        raise TeacherError(
            f"{folder} holds a key {name} already, and keys in use must not be replaced. Choose "
            "another name or folder, or remove the old files."
        ) from error
    except OSError as error:
        raise MachineError(
            f"{folder}: {error.strerror}. Keys need a folder that can be written; name another."
        ) from error
    return secret_path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:  # a file: not what this error means for a key
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error


def _write_new(path: Path, text: str, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def read_pair(path: Path) -> KeyPair:
    """Read a `.key_secret` file.

    Raises:
        TeacherError: it is missing, holds no pair, or others than its owner may read it.
    """
    public, secret = _read(path)
    if secret is None:
        raise TeacherError(
            f"{path} holds no secret key. Name the file that ends in .key_secret; "
            "tools/teacher_keys.py makes one."
        )
    if zmq.curve_public(secret) != public:
        raise TeacherError(
            f"{path} holds a public and a secret key that are no pair. Copy it again, or make a "
            "new pair with tools/teacher_keys.py."
        )
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise TeacherError(
            f"{path} has mode {mode:04o}, so others than its owner can use the secret in it; it "
            f"must be 0600. Run chmod 600 {path}, and make new keys if others could read it."
        )
    return KeyPair(public, secret)


def read_public(path: Path) -> bytes:
    """Read the public key in a `.key` file, 40 characters.

    Raises:
        TeacherError: it is missing or holds none.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError, IndexError) as error:
        reason = error if path.exists() else "there is no such file"
        raise TeacherError(
            f"{path} cannot be read as a key ({reason}); tools/teacher_keys.py makes keys, and "
            "docs/distillation.md says who needs which."
        ) from error
    if not _is_key(public) or not (secret is None or _is_key(secret)):
        raise TeacherError(
            f"{path} holds a key that is not 40 characters of Z85, ZeroMQ's text of 32 bytes. Copy "
            "it again."
        )
    return public, secret


def _is_key(text: bytes) -> bool:
    try:
        return len(text) == 40 and len(z85.decode(text)) == 32
    except (KeyError, struct.error):  # a character, or five of them, that stand for nothing
        return False


@dataclass(frozen=True, slots=True)
class PoolKeys:
    """What a replica needs of a folder of keys."""

    pair: KeyPair
    students: Path
    """Folder of the public keys that may connect."""


def read_pool_keys(folder: Path) -> PoolKeys:
    """Read a replica's keys.

    Raises:
        TeacherError: the pool's secret is missing or open to others, or no student has a key.
    """
    pair = read_pair(folder / f"{POOL}.key_secret")
    students = folder / STUDENTS
    public_files = sorted(students.glob("*.key"))
    for path in public_files:
        read_public(path)
    if not public_files:
        raise TeacherError(
            f"{students} holds no student's public key, so nobody could connect. Make one: "
            f"python tools/teacher_keys.py {folder} --student NAME."
        )
    return PoolKeys(pair, students)


@dataclass(frozen=True, slots=True)
class StudentKeys:
    """What a student needs of a folder of keys."""

    pair: KeyPair
    pool: bytes
    """The pool's public key, 40 characters."""


def read_student_keys(folder: Path, name: str) -> StudentKeys:
    """Read a student's keys: `students/NAME.key_secret` and `pool.key`.

    Raises:
        TeacherError: one is missing, or the secret is open to others.
    """
    pair = read_pair(folder / STUDENTS / f"{name}.key_secret")
    return StudentKeys(pair, read_public(folder / f"{POOL}.key"))
