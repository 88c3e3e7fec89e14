"""A store of targets in a folder: written while a run trains, read by any later run.

Records are found by content key alone, so a store does not know step, rank, batch or order: it is
read with any layout that cuts the data into the same sequences. Several processes may write at the
same time, each its own shards; a key that two of them write is harmless.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_mlr1.errors import DataError, TeacherError
from megatron_mlr1.teacher import payloads
from megatron_mlr1.teacher.backend import ImmediateTeacher, refuse_rows
from megatron_mlr1.teacher.spec import (
    TargetRequest,
    Targets,
    TargetSpec,
    TeacherIdentity,
    layout,
)
from megatron_mlr1.teacher.store_files import (
    INDEX,
    PARTIAL,
    SHARD,
    Shard,
    ShardWriter,
    as_record,
    flush_folder,
    names_the_store,
    read_record,
    refuses_broken,
    sweep,
    to_disk,
)

MANIFEST: Final = "store.json"
VERSION: Final = 1
HEAD: Final = "head"
HEAD_ROWS: Final = 4096
"""Rows of the head in one record."""
SHARD_BYTES: Final = 512 * 2**20
RESCAN_S: Final = 2.0


class TargetStore:
    """One teacher's targets of one form in one folder. `add` and `get` may run in two threads."""

    def __init__(self, folder: Path, identity: TeacherIdentity, spec: TargetSpec) -> None:
        """Take a folder whose manifest says the same; `open_store` and `make_store` do."""
        self.folder, self.identity, self.spec = folder, identity, spec
        self._writer: ShardWriter | None = None
        self._writing, self._finding = threading.Lock(), threading.Lock()
        self._shards: dict[str, Shard] = {}
        self._order: list[str] = []
        """Names of shards, the one that was read last first: neighbours lie together."""
        self._rescan_at = 0.0
        self.rescan()

    def rescan(self) -> None:
        """See the shards that were finished since the last look.

        Raises:
            DataError: a shard is broken.
        """
        with self._finding:
            self._look_for_shards()

    def _look_for_shards(self) -> None:
        for path in sorted(self.folder.glob(f"*{INDEX}")):
            if path.stem not in self._shards:
                self._shards[path.stem] = Shard(path)
                self._order.insert(0, path.stem)
        self._rescan_at = time.monotonic() + RESCAN_S

    @property
    def num_records(self) -> int:
        """Count the records of finished shards, those that were written twice too."""
        return sum(len(shard) for shard in self._shards.values())

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def get(self, key: bytes, rows: int) -> Targets | None:
        """Give the targets of a key, of so many rows; None where no finished shard has them.

        Raises:
            DataError: what is stored is broken.
        """
        found = self._find(key)
        if found is None:
            return None
        wanted = layout(self.spec, self.identity, rows)
        return Targets(self.spec, found[0].read(found[1], key, wanted))

    def add(self, key: bytes, targets: Targets) -> None:
        """Store targets, if they are not there yet; `flush` lets readers see them.

        Raises:
            MachineError: the disk is full or failed; targets since the last `flush` are not stored.
        """
        with self._writing:
            if key in self or (self._writer is not None and key in self._writer):
                return
            if self._writer is None:
                sweep(self.folder)
                self._writer = ShardWriter(self.folder, self.identity.vocab_size)
            writer, self._writer = self._writer, None
            writer.add(key, targets.arrays)
            if writer.num_bytes >= SHARD_BYTES:
                self._publish(writer)
            else:
                self._writer = writer

    def flush(self) -> None:
        """Finish the shard that is being written.

        Raises:
            MachineError: the disk is full or failed.
        """
        with self._writing:
            writer, self._writer = self._writer, None
            if writer is not None:
                self._publish(writer)

    def _publish(self, writer: ShardWriter) -> None:
        writer.publish()
        self.rescan()

    def _find(self, key: bytes) -> tuple[Shard, int] | None:
        with self._finding:
            found = self._look_up(key)
            if found is None and time.monotonic() >= self._rescan_at:
                self._look_for_shards()
                found = self._look_up(key)
            return found

    def _look_up(self, key: bytes) -> tuple[Shard, int] | None:
        for name in self._order:
            place = self._shards[name].find(key)
            if place is not None:
                if name != self._order[0]:
                    self._order = [name, *(other for other in self._order if other != name)]
                return self._shards[name], place
        return None

    # The head: students of hidden states need it, and a store must do without the teacher.

    @property
    def _head_path(self) -> Path:
        return self.folder / f"{HEAD}{SHARD}"

    @property
    def has_head(self) -> bool:
        """Say whether the head is stored."""
        return self._head_path.exists()

    def keep_head(self, head: Callable[[int, int], NDArray[Any]]) -> None:
        """Store the teacher's head, unless it is there; of several writers the last one counts.

        Args:
            head: gives rows [begin, end).

        Raises:
            MachineError: the disk is full or failed.
        """
        path = self._head_path
        # A name of its own: what a killed writer left must not keep the next one from writing.
        partial = path.with_name(f"{HEAD}.{uuid.uuid4().hex}{PARTIAL}")
        if self.has_head:
            return
        sweep(self.folder)
        with names_the_store(self.folder):
            try:
                with partial.open("xb") as file:
                    self._write_head(file, head)
                partial.replace(path)
                flush_folder(self.folder)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def head(self, begin: int, end: int) -> NDArray[Any]:
        """Give rows [begin, end) of the head.

        Raises:
            TeacherError: the store has no head, or the rows are outside of it.
            DataError: the file is broken.
        """
        refuse_rows(begin, end, self.identity)
        path = self._head_path
        if not self.has_head:
            raise TeacherError(
                f"{self.folder} holds no head of the teacher, which the form {self.spec.form} "
                "needs. Open the store once as `tiered:` with a pool, which writes it."
            )
        parts = []
        with refuses_broken(path):
            stream = pa.ipc.open_file(pa.memory_map(str(path)))
            for place in range(begin // HEAD_ROWS, (end - 1) // HEAD_ROWS + 1):
                first = place * HEAD_ROWS
                rows = read_record(stream, place, _head_key(first))[HEAD]
                parts.append(rows[max(begin - first, 0) : end - first])
        return np.concatenate(parts)

    def _write_head(self, file: BinaryIO, head: Callable[[int, int], NDArray[Any]]) -> None:
        rows = self.identity.vocab_size
        stream: pa.RecordBatchFileWriter | None = None
        for begin in range(0, rows, HEAD_ROWS):
            part = head(begin, min(begin + HEAD_ROWS, rows))
            batch, notes = as_record(_head_key(begin), {HEAD: part})
            stream = stream or pa.ipc.new_file(file, batch.schema)
            stream.write_batch(batch, custom_metadata=notes)
        assert stream is not None, "a vocabulary has rows"
        stream.close()
        to_disk(file)


def _head_key(begin: int) -> bytes:
    return f"head {begin}".encode()


class StoredTeacher(ImmediateTeacher):
    """A store in the place of a teacher; it knows the sequences that were stored, and no others."""

    def __init__(self, store: TargetStore) -> None:
        """Take an opened store."""
        super().__init__(store.identity)
        self._store = store

    def head(self, begin: int, end: int) -> NDArray[Any]:
        """Give rows [begin, end) of the stored head.

        Raises:
            TeacherError: the store has none, or the rows are outside of it.
            DataError: the file is broken.
        """
        return self._store.head(begin, end)

    def _refuse(self, key: bytes, request: TargetRequest) -> None:
        super()._refuse(key, request)
        refuse_form(self._store, request.spec)
        if key not in self._store:
            raise TeacherError(
                f"{self._store.folder} has no targets for a sequence of {request.rows} tokens "
                f"(key {key.hex()}). They are found by tokens, document bounds and form alone: "
                "train on the same sequences, or give `tiered:` with a pool that makes what is "
                "missing."
            )

    def _answer(self, key: bytes, request: TargetRequest) -> Targets:
        targets = self._store.get(key, request.rows)
        assert targets is not None, "a finished shard stays"
        return targets


def refuse_form(store: TargetStore, spec: TargetSpec) -> None:
    """Refuse another form than the store's.

    Raises:
        TeacherError: the forms differ.
    """
    if spec == store.spec:
        return
    has, wants = asdict(store.spec), asdict(spec)
    others = [f"{name} {has[name]}, not {wants[name]}" for name in has if has[name] != wants[name]]
    raise TeacherError(
        f"{store.folder} holds other targets than the run asks for: {'; '.join(others)}. A store "
        "has one form: ask for that, or name another folder."
    )


def open_store(folder: Path) -> TargetStore:
    """Open a store that is there, whoever its teacher is.

    Raises:
        DataError: there is none, or its manifest is broken.
    """
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_text("utf-8"))
        if fields["version"] != VERSION:
            raise ValueError(f"version {fields['version']} where only {VERSION} is known")
        identity = _read_identity(fields["identity"])
        spec = TargetSpec(**fields["spec"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, TeacherError) as error:
        raise DataError(
            f"{path} does not describe a store of targets: {error}. Name the folder of a store; "
            "`tiered:` with a pool makes one."
        ) from error
    return TargetStore(folder, identity, spec)


def _read_identity(fields: dict[str, Any]) -> TeacherIdentity:
    """Read what `asdict` made of an identity.

    Raises:
        ValueError, TeacherError: it is none.
    """
    names = TeacherIdentity.__dataclass_fields__.keys()
    if fields.keys() != names:
        raise ValueError(f"a teacher's identity has the fields {', '.join(names)}")
    for name in names:
        if type(fields[name]) not in payloads.HELLO_ACK_FIELDS[name]:
            raise ValueError(f"the teacher's {name} is {fields[name]!r}")
    return payloads.read_identity(fields)


def make_store(folder: Path, identity: TeacherIdentity, spec: TargetSpec) -> TargetStore:
    """Open the store of a teacher and a form, and make it where there is none.

    Raises:
        TeacherError: the folder holds the store of another teacher or form.
        DataError: its manifest is broken.
        MachineError: the folder cannot be written.
    """
    path = folder / MANIFEST
    if not path.exists():
        fields = {"version": VERSION, "identity": asdict(identity), "spec": asdict(spec)}
        with names_the_store(folder):
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{MANIFEST}.{uuid.uuid4().hex}{PARTIAL}"
            try:
                with partial.open("xb") as file:
                    file.write(json.dumps(fields, indent=1).encode())
                    to_disk(file)
                with suppress(FileExistsError):  # of several processes, one is first
                    os.link(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            flush_folder(folder)
    store = open_store(folder)
    if store.identity.fingerprint != identity.fingerprint:
        raise TeacherError(
            f"{folder} holds targets of the teacher {store.identity.name} (fingerprint "
            f"{store.identity.fingerprint}); this run's is {identity.name} "
            f"({identity.fingerprint}). Targets of two teachers do not mix; name another folder."
        )
    refuse_form(store, spec)
    return store
