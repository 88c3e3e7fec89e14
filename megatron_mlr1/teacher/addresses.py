"""Which teacher the word after `--teacher` names, and how it is reached."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch

from megatron_mlr1.errors import ConfigError, TeacherError
from megatron_mlr1.teacher.backend import TeacherBackend
from megatron_mlr1.teacher.client import ClientOptions, ServedTeacher
from megatron_mlr1.teacher.connection import Wanted, difference
from megatron_mlr1.teacher.in_process import InProcessTeacher, NullTeacher
from megatron_mlr1.teacher.keys import read_pair, read_public
from megatron_mlr1.teacher.memory import keep_large_blocks
from megatron_mlr1.teacher.open_files import allow_many
from megatron_mlr1.teacher.pool import open_pool
from megatron_mlr1.teacher.replicas import Access, StudentKeys
from megatron_mlr1.teacher.spec import TargetSpec, TeacherIdentity
from megatron_mlr1.teacher.store import MANIFEST, StoredTeacher, make_store, open_store, refuse_form
from megatron_mlr1.teacher.tiered import TieredTeacher

FORMS_OF_ADDRESS: Final = (
    "tcp://HOST:PORT[,HOST:PORT...] or the folder of a pool; store:DIR; "
    "tiered:DIR,+POOL; inprocess:HF_DIR; null:VOCABULARY,WIDTH"
)
_KINDS: Final = ("store", "tiered", "inprocess", "null")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherOptions:
    """What a run says of its teacher."""

    address: str
    """As `FORMS_OF_ADDRESS` has it."""
    spec: TargetSpec
    """The form of the targets that the run will ask for."""
    wanted: Wanted
    """Tokenizer and vocabulary of the student; a fingerprint where one teacher alone will do."""
    student: str = ""
    """The student's name, for people who look at the replicas."""
    key: Path | None = None
    """The student's `.key_secret`; None reaches only a pool without keys."""
    pool_key: Path | None = None
    """The pool's `pool.key`; comes with `key`."""
    device: str = "cpu"
    """Of a teacher in this process."""
    dtype: str = "bfloat16"
    """Of a teacher in this process."""
    client: ClientOptions = field(default_factory=ClientOptions)

    def __post_init__(self) -> None:
        if (self.key is None) != (self.pool_key is None):
            raise ConfigError(
                f"the student's key is {self.key} and the pool's is {self.pool_key}; both or none "
                "must be given. tools/teacher_keys.py makes them."
            )


def open_backend(options: TeacherOptions) -> TeacherBackend:
    """Open the teacher that a run names.

    Raises:
        ConfigError: the address is none.
        TeacherUnavailable: no replica answered in time.
        TeacherError: the teacher does not fit the student, its keys or its store.
        DataError: a store is missing or broken.
    """
    kind, _, rest = options.address.partition(":")
    if kind not in _KINDS:
        return _served(options.address, options)
    if not rest:
        raise ConfigError(f"{options.address!r} names no teacher; write {FORMS_OF_ADDRESS}.")
    if kind == "store":
        return _stored(Path(rest), options)
    if kind == "tiered":
        return _tiered(rest, options)
    return _in_process(rest, options) if kind == "inprocess" else _null(rest)


def _served(where: str, options: TeacherOptions) -> ServedTeacher:
    keys = None
    if options.key is not None and options.pool_key is not None:
        keys = StudentKeys(read_pair(options.key), read_public(options.pool_key))
    access = Access(
        pool=open_pool(where), keys=keys, wanted=options.wanted, student=options.student
    )
    keep_large_blocks()
    allow_many()
    return ServedTeacher(access, options.client)


def _stored(folder: Path, options: TeacherOptions) -> StoredTeacher:
    store = open_store(folder)
    _refuse_other(store.identity, options.wanted, folder)
    refuse_form(store, options.spec)
    return StoredTeacher(store)


def _tiered(where: str, options: TeacherOptions) -> TieredTeacher:
    name, _, pool = where.partition(",+")
    if not name or not pool:
        raise ConfigError(f"tiered:{where} lacks a part; write tiered:DIR,+POOL.")
    folder = Path(name)
    if not (folder / MANIFEST).exists():
        teacher = _served(pool, options)
        try:
            store = make_store(folder, teacher.identity, options.spec)
        except BaseException:
            teacher.close()
            raise
        return TieredTeacher(store, lambda: teacher)
    store = open_store(folder)
    _refuse_other(store.identity, options.wanted, folder)
    refuse_form(store, options.spec)
    fingerprint = store.identity.fingerprint
    same = replace(options, wanted=replace(options.wanted, fingerprint=fingerprint))
    return TieredTeacher(store, lambda: _served(pool, same))


def _refuse_other(identity: TeacherIdentity, wanted: Wanted, folder: Path) -> None:
    other = difference(identity, wanted)
    if other:
        raise TeacherError(
            f"{folder} holds targets of another teacher than this run can learn from: {other}. "
            "Name another store, or train with that teacher's tokenizer."
        )


def _in_process(folder: str, options: TeacherOptions) -> InProcessTeacher:
    from megatron_mlr1.teacher.model import load_teacher  # transformers, which others do without

    engine = load_teacher(Path(folder), torch.device(options.device), options.dtype)
    _refuse_other(engine.identity, options.wanted, Path(folder))
    return InProcessTeacher(engine)


def _null(sizes: str) -> NullTeacher:
    try:
        vocab_size, hidden_size = (int(size) for size in sizes.split(","))
    except ValueError as error:
        raise ConfigError(f"null:{sizes} has no two sizes; write null:VOCABULARY,WIDTH.") from error
    return NullTeacher(vocab_size, hidden_size)
