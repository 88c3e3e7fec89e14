"""Asking for targets before they are needed: pre-training knows its next micro-batches."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.errors import Mlr1Error, TeacherError
from megatron_mlr1.teacher.backend import TeacherBackend, TeacherUnavailable, Ticket
from megatron_mlr1.teacher.spec import TargetRequest, Targets, TargetSpec

DEPTH: Final = 8
"""Micro-batches ahead where nobody has measured."""


def depth_for(detect_s: float, service_s: float, micro_batch_s: float) -> int:
    """Work out how many micro-batches ahead hide the death of a replica.

    ceil((detect + service) / micro-batch) + 1: from the moment a replica hangs, its work is found
    missing after `detect_s` (2 s for one that falls silent, 0 for one whose connection breaks) and
    made anew in `service_s`, while the training uses up a micro-batch every `micro_batch_s`. With
    2 s, 0.415 s and 0.273 s (a 950M student, an 8B teacher, H100) it is 10.
    """
    return math.ceil((detect_s + service_s) / micro_batch_s) + 1


@dataclass(frozen=True, slots=True)
class Ahead[B]:
    """A micro-batch whose targets have been asked for."""

    batch: B
    """As the loader gave it."""

    tickets: tuple[Ticket, ...]
    """One for each of its sequences, in order."""

    def __getstate__(self) -> tuple[B, tuple[Ticket, ...]]:
        """Keep the batch alone: tickets are of no use in another process."""
        return self.batch, ()

    def __setstate__(self, state: tuple[B, tuple[Ticket, ...]]) -> None:
        for name, value in zip(("batch", "tickets"), state, strict=True):
            object.__setattr__(self, name, value)


class Lookahead[B]:
    """An iterator over micro-batches that keeps the next ones' targets on their way.

    Nothing of it needs to be saved: after a restart the loader is rewound as always, and requests
    are made again. A micro-batch that the engine replays within a step gets the targets that it had
    the first time, until `step_done`. Whatever goes wrong is said by `is_ready`, before the step
    that it concerns: in the middle of one, other ranks wait in collectives.
    """

    def __init__(
        self,
        batches: Iterator[B],
        requests_of: Callable[[B], Sequence[TargetRequest]],
        teacher: TeacherBackend,
        depth: int = DEPTH,
    ) -> None:
        """Wrap a loader's iterator; nothing is read before the first micro-batch is asked for.

        Args:
            batches: micro-batches of this process, in order.
            requests_of: makes the requests for the sequences of a micro-batch, in order.
            teacher: who is asked.
            depth: micro-batches that are asked for before they are needed, at least.
        """
        if depth < 1:
            raise TeacherError(f"a lookahead of {depth} micro-batches is none; choose 1 or more.")
        self._batches, self._requests_of = batches, requests_of
        self._teacher, self._depth = teacher, depth
        self._window: deque[Ahead[B]] = deque()
        self._position = 0
        self._ended = False
        self._error: Mlr1Error | None = None
        """Why nothing can be asked for beyond the window."""
        self._given: list[Ahead[B]] = []
        """Micro-batches that left the window since the last step was done."""
        self._held: dict[bytes, Targets] = {}
        """What this step has fetched, by content key."""
        self._fetched: set[int] = set()
        """Numbers of tickets that this step has fetched."""

    def __iter__(self) -> Iterator[Ahead[B]]:
        return self

    def __next__(self) -> Ahead[B]:
        self._fill(self._depth + 1)
        if not self._window:
            raise self._error or StopIteration
        self._given.append(self._window.popleft())
        return self._given[-1]

    def is_ready(self, num_micro_batches: int) -> bool:
        """Bring the targets of the next micro-batches here, and say whether all have come.

        Asks for them and waits for none; from now on as many are asked for ahead, so that a step's
        targets are made during the one before. It is what the ranks agree on before a step
        (`agreement.Agreement.decide`); where it says yes, `targets` gives what is held here, and
        the step can neither run dry nor fail for the teacher in its middle.

        Raises:
            Mlr1Error: targets of one of them cannot be had at all.
        """
        self._depth = max(self._depth, num_micro_batches)
        self._fill(num_micro_batches)
        soon = [self._window[i] for i in range(min(num_micro_batches, len(self._window)))]
        tickets = [ticket for one in soon for ticket in one.tickets]
        # Not `all` over the tickets: an error of a later one is to be seen too.
        answers = [self._is_here(ticket) for ticket in tickets]
        if len(soon) < num_micro_batches and self._error is not None:
            raise self._error
        if not all(answers):
            return False
        try:
            for ticket in tickets:
                self._fetch(ticket, 0.0)
        except TeacherUnavailable:  # taken back in the meantime, for a replica that answers wrongly
            return False
        return True

    def targets(self, ahead: Ahead[B], timeout_s: float) -> list[Targets]:
        """Give the targets of a micro-batch, one for each of its sequences; wait if need be.

        A micro-batch that was replayed from another process's memory is asked for again.

        Raises:
            TeacherUnavailable: they did not come in time; asking again is fine.
            TeacherError: they cannot be had at all.
        """
        tickets = ahead.tickets
        if not tickets:
            requests = self._requests_of(ahead.batch)
            tickets = tuple(self._teacher.submit(one, self._position) for one in requests)
            # Whoever replays this object again must not ask a third time.
            object.__setattr__(ahead, "tickets", tickets)
        for ticket in tickets:
            self._fetch(ticket, timeout_s)
        return [self._held[ticket.key] for ticket in tickets]

    def step_done(self) -> None:
        """Let go of what the step was given and has fetched; the engine will not replay it.

        Targets that nobody fetched, of a step without the teacher, are given up.
        """
        for ahead in self._given:
            for ticket in ahead.tickets:
                if ticket.number not in self._fetched:
                    self._teacher.drop(ticket)
        self._given.clear()
        self._held.clear()
        self._fetched.clear()

    def _is_here(self, ticket: Ticket) -> bool:
        return ticket.number in self._fetched or self._teacher.ready(ticket)

    def _fetch(self, ticket: Ticket, timeout_s: float) -> None:
        if ticket.number not in self._fetched:
            self._held[ticket.key] = self._teacher.fetch(ticket, timeout_s)
            self._fetched.add(ticket.number)

    def _fill(self, num_micro_batches: int) -> None:
        while len(self._window) < num_micro_batches and not self._ended and self._error is None:
            try:
                batch = next(self._batches)
            except StopIteration:
                self._ended = True
                return
            try:
                requests = self._requests_of(batch)
                tickets = tuple(self._teacher.submit(one, self._position) for one in requests)
            except Mlr1Error as error:
                self._error = error
                return
            self._window.append(Ahead(batch, tickets))
            self._position += 1


def row_requests(
    tokens_BS: NDArray[Any], bounds: Sequence[NDArray[Any]] | None, spec: TargetSpec
) -> list[TargetRequest]:
    """Make the requests of a micro-batch.

    Args:
        tokens_BS: B sequences of S tokens, on the host; copied, so that the loader may use its
            memory again.
        bounds: of each sequence, (D + 1,) from 0 to S; None where each is one document.
        spec: the form of the targets.
    """
    whole = np.array([0, tokens_BS.shape[1]], "<i4")
    return [
        TargetRequest(
            row.astype("<i4", order="C", copy=True),
            whole if bounds is None else np.asarray(bounds[i], "<i4"),
            spec,
        )
        for i, row in enumerate(tokens_BS)
    ]
