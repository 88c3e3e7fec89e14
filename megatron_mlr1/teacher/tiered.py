"""A store with a teacher behind it: what is missing is made, delivered, and stored."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from numpy.typing import NDArray

from megatron_mlr1.teacher.backend import (
    Statistics,
    TeacherBackend,
    Ticket,
    outside_of_vocabulary,
)
from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.spec import TargetRequest, Targets, TeacherIdentity
from megatron_mlr1.teacher.store import TargetStore, refuse_form

MAX_BACKLOG: Final = 16
"""Targets that wait to be written; the training waits for the disk beyond that."""


class TieredTeacher:
    """Answers from the store where it can, else from the teacher, and stores what that gives."""

    def __init__(self, store: TargetStore, connect: Callable[[], TeacherBackend]) -> None:
        """Take an opened store.

        Args:
            store: of the same teacher that `connect` gives.
            connect: called once, when the first sequence is missing.

        Raises:
            MachineError: the head cannot be stored.
        """
        self._store, self._connect = store, connect
        self._teacher: TeacherBackend | None = None
        self._open: dict[int, tuple[TargetRequest, Ticket | None]] = {}
        """The request, and the teacher's ticket where the store has no targets."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="teacher-store")
        self._backlog: list[Future[None]] = []
        self._num_submitted = self._num_stored = 0

    @property
    def identity(self) -> TeacherIdentity:
        """Say who answers."""
        return self._store.identity

    def submit(self, request: TargetRequest, deadline: int) -> Ticket:
        """Ask the teacher for what the store lacks; waits for its pool the first time.

        Raises:
            TeacherError: the form is not the store's, or the teacher cannot answer.
        """
        refuse_form(self._store, request.spec)
        if request.tokens.max() >= self.identity.vocab_size:
            raise outside_of_vocabulary(request, self.identity)
        key = content_key(self.identity, request)
        inner = None if key in self._store else self._ask().submit(request, deadline)
        ticket = Ticket(key, self._num_submitted, deadline)
        self._num_submitted += 1
        self._num_stored += inner is None
        self._open[ticket.number] = request, inner
        return ticket

    def ready(self, ticket: Ticket) -> bool:
        """Say whether `fetch` would not wait.

        Raises:
            TeacherError: the targets cannot be had at all.
        """
        _, inner = self._open[ticket.number]
        return inner is None or self._ask().ready(inner)

    def fetch(self, ticket: Ticket, timeout_s: float) -> Targets:
        """Give the targets, and have them stored if they were not.

        Raises:
            TeacherUnavailable: they did not come in time; the ticket is still good.
            TeacherError: they cannot be had at all.
            DataError: what is stored is broken.
            MachineError: earlier targets could not be stored.
        """
        request, inner = self._open[ticket.number]
        if inner is not None:
            targets = self._ask().fetch(inner, timeout_s)
            self._keep(ticket.key, targets)
        else:
            stored = self._store.get(ticket.key, request.rows)
            assert stored is not None, "a finished shard stays"
            stored.check(self.identity, request.rows)
            targets = stored
        del self._open[ticket.number]
        return targets

    def drop(self, ticket: Ticket) -> None:
        """Give up the targets of a ticket."""
        _, inner = self._open.pop(ticket.number)
        if inner is not None:
            self._ask().drop(inner)

    def head(self, begin: int, end: int) -> NDArray[Any]:
        """Give rows [begin, end) of the head, stored for good by the first process that asks.

        Raises:
            TeacherError: the teacher has no such rows, or is not there.
            MachineError: the head cannot be stored.
        """
        if not self._store.has_head:
            self._store.keep_head(self._ask().head)
        # Another process may be writing it just now.
        head = self._store.head if self._store.has_head else self._ask().head
        return head(begin, end)

    def statistics(self) -> Statistics:
        """Count requests, those answered by the store, and what the teacher counts."""
        behind = {} if self._teacher is None else self._teacher.statistics()
        return {**behind, "requests": self._num_submitted, "from_store": self._num_stored}

    def flush(self) -> None:
        """Let other processes, and a run that starts again, find all that was fetched so far.

        Raises:
            MachineError: the disk is full or failed.
        """
        self._settle(0)
        self._store.flush()

    def close(self) -> None:
        """Store what was fetched and let go of everything.

        Raises:
            MachineError: the disk is full or failed.
        """
        try:
            self.flush()
        finally:
            self._writer.shutdown()
            if self._teacher is not None:
                self._teacher.close()

    def _ask(self) -> TeacherBackend:
        if self._teacher is None:
            self._teacher = self._connect()
        return self._teacher

    def _keep(self, key: bytes, targets: Targets) -> None:
        self._backlog.append(self._writer.submit(self._store.add, key, targets))
        self._settle(MAX_BACKLOG)

    def _settle(self, allowed: int) -> None:
        """Wait until at most so many writes are outstanding; raise what one of them raised."""
        while self._backlog and (len(self._backlog) > allowed or self._backlog[0].done()):
            self._backlog.pop(0).result()
