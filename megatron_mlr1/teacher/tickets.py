"""The client's books: what was asked for, by whom it is awaited, and what has come.

The training's thread opens, takes and drops tickets; the client's own thread finishes them. Tickets
of the same content share one piece of work, so a sequence that comes twice is computed once, and
each ticket is delivered once, whatever the replicas send twice.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.backend import TeacherUnavailable, Ticket
from megatron_mlr1.teacher.spec import TargetRequest, Targets


class State(Enum):
    """How far a piece of work is."""

    QUEUED = auto()
    """No replica has it."""
    ASKED = auto()
    """At least one replica has it."""
    DONE = auto()
    """Its targets or its error are there."""


@dataclass(eq=False, slots=True)
class Work:
    """The targets of one content key, awaited by at least one ticket."""

    key: bytes
    request: TargetRequest
    num_bytes: int
    """Of its targets."""
    deadline: int
    """The earliest of its tickets."""
    order: int
    """The number of its first ticket; settles equal deadlines."""
    audited: bool
    """Whether two replicas must answer alike."""
    awaiting: set[int] = field(default_factory=set)
    """Numbers of the tickets that have not been served."""
    state: State = State.QUEUED
    asked: dict[str, float] = field(default_factory=dict)
    """Since when, by replica."""
    answers: dict[str, Targets] = field(default_factory=dict)
    """Of an audit, by replica."""
    killed: set[str] = field(default_factory=set)
    """Replicas that died while they worked on it."""
    hedged: bool = False
    targets: Targets | None = None
    error: TeacherError | None = None

    @property
    def urgency(self) -> tuple[int, int]:
        """Sorts: what is needed first comes first."""
        return self.deadline, self.order


class TicketTable:
    """All open work of one client; every method may be called by either thread."""

    def __init__(self) -> None:
        """Start empty."""
        self._changed = threading.Condition()
        self._by_key: dict[bytes, Work] = {}
        self._num_opened = 0
        self._wait_s = 0.0
        self._fatal: TeacherError | None = None

    def open(
        self, key: bytes, request: TargetRequest, deadline: int, num_bytes: int, audited: bool
    ) -> tuple[Ticket, Work | None]:
        """Open a ticket; give its work too where that is new."""
        with self._changed:
            ticket = Ticket(key, self._num_opened, deadline)
            self._num_opened += 1
            work, new = self._by_key.get(key), None
            if work is None:
                new = work = Work(key, request, num_bytes, deadline, ticket.number, audited)
                self._by_key[key] = work
            work.awaiting.add(ticket.number)
            return ticket, new

    def find(self, key: bytes) -> Work | None:
        """Give the open work of a key; None once its last ticket was served or dropped."""
        with self._changed:
            return self._by_key.get(key)

    def finish(self, work: Work, targets: Targets | None, error: TeacherError | None) -> None:
        """Let the waiting thread have the targets, or the reason why there are none."""
        with self._changed:
            assert work.state is not State.DONE, "work is finished once"
            work.state, work.targets, work.error = State.DONE, targets, error
            self._changed.notify_all()

    def reopen(self, work: Work) -> bool:
        """Take finished targets back, to make room; False where somebody took them first."""
        with self._changed:
            if work.state is not State.DONE or work.error or self._by_key.get(work.key) is not work:
                return False
            work.state, work.targets = State.QUEUED, None
            return True

    def fail(self, error: TeacherError) -> None:
        """Let whoever waits, now or later, have an error that nothing can mend."""
        with self._changed:
            self._fatal = self._fatal or error
            self._changed.notify_all()

    def ready(self, ticket: Ticket) -> bool:
        """Say whether `take` would not wait.

        Raises:
            TeacherError: the work failed.
        """
        with self._changed:
            self._raise_fatal()
            work = self._work_of(ticket)
            if work.error is not None:
                raise work.error
            return work.state is State.DONE

    def take(self, ticket: Ticket, timeout_s: float) -> tuple[Targets, Work | None]:
        """Wait for targets and serve the ticket; give the work too where it was its last.

        Raises:
            TeacherUnavailable: nothing came in time; the ticket is still open.
            TeacherError: the work failed.
        """
        begin = time.monotonic()
        with self._changed:
            work = self._work_of(ticket)
            in_time = self._changed.wait_for(
                lambda: self._fatal is not None or work.state is State.DONE, timeout_s
            )
            self._wait_s += time.monotonic() - begin
            self._raise_fatal()
            if not in_time:
                raise TeacherUnavailable(
                    f"no replica gave the targets of a sequence within {timeout_s:.0f} s. Start "
                    "replicas, or look at why those that run do not answer."
                )
            if work.error is not None:
                raise work.error
            assert work.targets is not None, "done without an error means targets"
            return work.targets, self._serve(work, ticket)

    def drop(self, ticket: Ticket) -> Work | None:
        """Serve a ticket with nothing; give the work where nobody awaits it any more."""
        with self._changed:
            return self._serve(self._work_of(ticket), ticket)

    def works(self) -> list[Work]:
        """List all open work."""
        with self._changed:
            return list(self._by_key.values())

    @property
    def wait_s(self) -> float:
        """Seconds that the training has waited in `take`, all told."""
        return self._wait_s

    @property
    def num_opened(self) -> int:
        """Tickets so far."""
        return self._num_opened

    def _work_of(self, ticket: Ticket) -> Work:
        work = self._by_key.get(ticket.key)
        assert work is not None, "a ticket is fetched or dropped once"
        assert ticket.number in work.awaiting, "a ticket is fetched or dropped once"
        return work

    def _serve(self, work: Work, ticket: Ticket) -> Work | None:
        work.awaiting.remove(ticket.number)
        if work.awaiting:
            return None
        del self._by_key[work.key]
        return work

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal


def most_urgent(works: Iterable[Work]) -> list[Work]:
    """Sort work by when it is needed."""
    return sorted(works, key=lambda work: work.urgency)
