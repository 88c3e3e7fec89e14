"""Bringing rows of the teacher's head to a student, part by part, from whoever serves."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher import payloads, wire
from megatron_mlr1.teacher.replicas import Replica, Replicas
from megatron_mlr1.teacher.spec import TeacherIdentity
from megatron_mlr1.teacher.wire import Kind, Message

PATIENCE_S: Final = 5.0
"""So long a job waits for members of the pool that do not serve yet, that two may agree."""


class HeadJob:
    """Rows [begin, end) on their way; the training's thread waits for `done`."""

    def __init__(self, begin: int, end: int) -> None:
        """Ask for a range that has been checked."""
        self.begin, self.end = begin, end
        self.rows: NDArray[Any] | None = None
        """(end - begin, d), filled up to `arrived`."""
        self.arrived = begin
        self.error: TeacherError | None = None
        """Why they do not come."""
        self.done = threading.Event()


class HeadDesk:
    """Works on one job, one part at a time; a part of a replica that dies is asked of another.

    The student multiplies by these rows all through its training, so no one replica is trusted with
    them: each part must come alike from two, where there are two.
    """

    def __init__(
        self, replicas: Replicas, numbers: Iterator[int], eject: Callable[[str, str], None]
    ) -> None:
        """Take who can be asked, the numbers of requests, and what ejects (name, reason)."""
        self._replicas, self._numbers, self._eject = replicas, numbers, eject
        self._job: HeadJob | None = None
        self._end = 0
        """Of the part that begins where the job has arrived."""
        self._given: dict[str, NDArray[Any]] = {}
        """That part, by replica."""
        self._asked: tuple[int, Replica, int] | None = None
        """Number, replica and bytes of the part that is on its way."""
        self._not_before = 0.0
        self._waits_until: float | None = None
        """For members that do not serve yet; None before the job's first turn."""

    def begin(self, job: HeadJob) -> None:
        """Take a job; the one before it has ended or nobody waits for it any more."""
        self._cancel()
        self._job = job

    def turn(self, now: float) -> None:
        """Ask for the next part where none is on its way."""
        if self._asked is not None and self._asked[1].connection.is_dead:
            self._asked = None
        job = self._job
        if job is None or self._asked is not None or now < self._not_before:
            return
        if self._waits_until is None:
            self._waits_until = now + PATIENCE_S
        others = [one for one in self._replicas.serving() if one.name not in self._given]
        if not others:
            if now >= self._waits_until or self._replicas.num_possible <= len(self._given):
                self._judge(job)
            return
        replica = min(others, key=lambda one: one.load.outstanding_tokens)
        if not self._given:
            self._end = min(job.arrived + replica.connection.max_head_rows, job.end)
        identity = self._identity
        num_bytes = 8 + (self._end - job.arrived) * identity.hidden_size * (
            identity.state_dtype.itemsize
        )
        number = next(self._numbers)
        replica.connection.ask_head(number, job.arrived, self._end, num_bytes)
        self._asked = number, replica, num_bytes

    def owns(self, number: int) -> bool:
        """Say whether a message is about the head."""
        return self._asked is not None and self._asked[0] == number

    def received(self, replica: Replica, message: Message, now: float) -> None:
        """Take a part, or ask again later."""
        job = self._job
        assert job is not None, "only parts of a job are asked for"
        assert self._asked is not None, "the message is about what was asked"
        replica.connection.settle(self._asked[2])
        self._asked = None
        if message.kind is not Kind.HEAD:
            self._not_before = now + 0.1
            if message.kind is Kind.ERROR:
                replica.connection.die(
                    f"it gives no rows of its head: {bytes(message.frames[0])!r}"
                )
            return
        try:
            begin, rows = payloads.read_head(message, self._identity)
        except TeacherError as error:
            replica.connection.die(f"it sent no rows of a head: {error}")
            return
        if (begin, begin + rows.shape[0]) != (job.arrived, self._end):
            replica.connection.die("it sent other rows of its head than were asked for")
            return
        self._given[replica.name] = rows
        if len(self._given) > 1:
            self._judge(job)

    def _judge(self, job: HeadJob) -> None:
        """Take the part that was given, where nobody contradicts; eject who is alone with his."""
        if not self._given:
            return
        marks = {name: xxhash.xxh3_128_digest(_bytes(rows)) for name, rows in self._given.items()}
        counts = Counter(marks.values())
        (most, votes), *others = counts.most_common()
        if others and votes == 1:
            if self._replicas.num_possible > len(self._given):
                return  # another one says who is right
            names = " and ".join(sorted(self._given))
            self._fail(
                job,
                f"replicas {names} give different rows of the teacher's head, and no other "
                "is there to say which is right. Stop them, and start replicas anew.",
            )
            return
        for name, mark in marks.items():
            if mark != most:
                self._eject(name, "two others agree on other rows of the head than it gave")
        rows = next(rows for name, rows in self._given.items() if marks[name] == most)
        self._keep(job, rows)

    def _keep(self, job: HeadJob, rows: NDArray[Any]) -> None:
        if job.rows is None:
            job.rows = np.empty((job.end - job.begin, rows.shape[1]), rows.dtype)
        place = job.arrived - job.begin
        job.rows[place : place + rows.shape[0]] = rows
        job.arrived, self._given = self._end, {}
        if job.arrived == job.end:
            self._job = None
            job.done.set()

    def _fail(self, job: HeadJob, reason: str) -> None:
        self._job, self._given = None, {}
        job.error = TeacherError(reason)
        job.done.set()

    @property
    def _identity(self) -> TeacherIdentity:
        identity = self._replicas.identity
        assert identity is not None, "who serves has said who it is"
        return identity

    def _cancel(self) -> None:
        if self._asked is not None:
            number, replica, num_bytes = self._asked
            replica.connection.cancel(number, wire.NO_KEY)
            replica.connection.settle(num_bytes)
        self._job, self._asked, self._given, self._waits_until = None, None, {}, None


def _bytes(rows: NDArray[Any]) -> memoryview:
    return memoryview(rows.reshape(-1).view("u1"))
