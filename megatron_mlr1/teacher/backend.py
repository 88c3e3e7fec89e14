"""What the training asks for targets: one interface, whoever answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.spec import TargetRequest, Targets, TeacherIdentity


class TeacherUnavailable(TeacherError):  # noqa: N818 - a state of the pool, no mistake
    """No teacher answered for as long as the run may wait; a run started again goes on."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: the launcher may start the run again."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Stands for targets that were asked for; each is fetched or dropped exactly once."""

    key: bytes
    """16 bytes: the content key of the request."""

    number: int
    """Tells tickets of the same content apart; the backend's own count."""

    deadline: int
    """When the targets are needed: place of the micro-batch in the order of this process."""


type Statistics = Mapping[str, float]
"""Figures by name; what a backend counts it lists in its own `statistics`."""


class TeacherBackend(Protocol):
    """Answers requests for targets. All methods are called by one thread of the training."""

    @property
    def identity(self) -> TeacherIdentity:
        """Say who answers."""

    def submit(self, request: TargetRequest, deadline: int) -> Ticket:
        """Ask for the targets of one sequence; does not wait.

        Args:
            request: the sequence; its arrays must not change until the ticket is fetched.
            deadline: lower ones are needed, and computed, first.

        Raises:
            TeacherError: this teacher can never answer the request.
        """

    def ready(self, ticket: Ticket) -> bool:
        """Say whether `fetch` would not wait.

        Raises:
            TeacherError: the targets cannot be had at all.
        """

    def fetch(self, ticket: Ticket, timeout_s: float) -> Targets:
        """Give the targets, waiting for them if need be; the ticket is then gone.

        Raises:
            TeacherUnavailable: they did not come in time; the ticket is still good.
            TeacherError: they cannot be had at all.
        """

    def drop(self, ticket: Ticket) -> None:
        """Give up the targets of a ticket, as a step does that goes on without the teacher."""

    def head(self, begin: int, end: int) -> NDArray[Any]:
        """Give rows [begin, end) of the teacher's head.

        Returns:
            (end - begin, d) of `identity.state_dtype`.

        Raises:
            TeacherUnavailable: no teacher answered in time.
            TeacherError: this backend has no head, or the rows are outside of it.
        """

    def statistics(self) -> Statistics:
        """Count what happened so far."""

    def close(self) -> None:
        """Let go of threads, sockets and files; open tickets are void."""


class ImmediateTeacher(ABC):
    """A teacher that answers when it is asked, in the thread that asks."""

    def __init__(self, identity: TeacherIdentity) -> None:
        """Take who answers."""
        self._identity = identity
        self._open: dict[int, TargetRequest] = {}
        self._num_submitted = 0

    @property
    def identity(self) -> TeacherIdentity:
        """Say who answers."""
        return self._identity

    def submit(self, request: TargetRequest, deadline: int) -> Ticket:
        """Keep the request until its targets are fetched.

        Raises:
            TeacherError: this teacher cannot answer it.
        """
        key = content_key(self._identity, request)
        self._refuse(key, request)
        ticket = Ticket(key, self._num_submitted, deadline)
        self._num_submitted += 1
        self._open[ticket.number] = request
        return ticket

    def ready(self, ticket: Ticket) -> bool:
        """Say yes: the answer is made in `fetch`."""
        return ticket.number in self._open

    def fetch(self, ticket: Ticket, timeout_s: float) -> Targets:
        """Make the targets; they are checked as those of a replica are.

        Raises:
            TeacherError: the answer is not sound.
        """
        request = self._open.pop(ticket.number)
        targets = self._answer(ticket.key, request)
        targets.check(self._identity, request.rows)
        return targets

    def drop(self, ticket: Ticket) -> None:
        """Forget the request."""
        del self._open[ticket.number]

    def statistics(self) -> Statistics:
        """Count the requests."""
        return {"requests": self._num_submitted, "in_flight": len(self._open)}

    def close(self) -> None:
        """Forget all requests."""
        self._open.clear()

    def _refuse(self, key: bytes, request: TargetRequest) -> None:
        """Raise TeacherError where the request can never be answered."""
        if request.tokens.max() >= self._identity.vocab_size:
            raise outside_of_vocabulary(request, self._identity)

    @abstractmethod
    def _answer(self, key: bytes, request: TargetRequest) -> Targets:
        """Make the targets of a request."""


def outside_of_vocabulary(request: TargetRequest, identity: TeacherIdentity) -> TeacherError:
    """Make the error for a token that the teacher has no row for."""
    return TeacherError(
        f"a sequence holds the token {int(request.tokens.max())}; the teacher {identity.name} has "
        f"{identity.vocab_size} ids. Student and teacher must share the tokenizer; prepare the "
        "corpora with the teacher's."
    )


def refuse_rows(begin: int, end: int, identity: TeacherIdentity) -> None:
    """Refuse a range that is no rows of the head.

    Raises:
        TeacherError: it is empty or outside of the vocabulary.
    """
    if not 0 <= begin < end <= identity.vocab_size:
        raise TeacherError(
            f"rows [{begin}, {end}) of the head of {identity.name} are asked for; it has "
            f"{identity.vocab_size} rows. Ask for a part of those, and mask padded rows."
        )
