"""Bringing rows of the teacher's head to a student, part by part, from whoever serves."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher import payloads, wire
from megatron_mlr1.teacher.replicas import Replica, Replicas
from megatron_mlr1.teacher.wire import Kind, Message


class HeadJob:
    """Rows [begin, end) on their way; the training's thread waits for `done`."""

    def __init__(self, begin: int, end: int) -> None:
        """Ask for a range that has been checked."""
        self.begin, self.end = begin, end
        self.rows: NDArray[Any] | None = None
        """(end - begin, d), filled up to `arrived`."""
        self.arrived = begin
        self.done = threading.Event()


class HeadDesk:
    """Works on one job, one part at a time; a part of a replica that dies is asked of another."""

    def __init__(self, replicas: Replicas, numbers: Iterator[int]) -> None:
        """Take who can be asked, and the numbers of requests."""
        self._replicas, self._numbers = replicas, numbers
        self._job: HeadJob | None = None
        self._asked: tuple[int, Replica, int] | None = None
        """Number, replica and bytes of the part that is on its way."""
        self._not_before = 0.0

    def begin(self, job: HeadJob) -> None:
        """Take a job; the one before it has ended or nobody waits for it any more."""
        self._cancel()
        self._job = job

    def turn(self, now: float) -> None:
        """Ask for the next part where none is on its way."""
        if self._asked is not None and self._asked[1].connection.is_dead:
            self._asked = None
        job, serving = self._job, self._replicas.serving()
        if job is None or self._asked is not None or not serving or now < self._not_before:
            return
        identity = self._replicas.identity
        assert identity is not None, "who serves has said who it is"
        if job.rows is None:
            job.rows = np.empty((job.end - job.begin, identity.hidden_size), identity.state_dtype)
        replica = min(serving, key=lambda one: one.load.outstanding_tokens)
        end = min(job.arrived + replica.connection.max_head_rows, job.end)
        num_bytes = 8 + (end - job.arrived) * identity.hidden_size * identity.state_dtype.itemsize
        number = next(self._numbers)
        replica.connection.ask_head(number, job.arrived, end, num_bytes)
        self._asked = number, replica, num_bytes

    def owns(self, number: int) -> bool:
        """Say whether a message is about the head."""
        return self._asked is not None and self._asked[0] == number

    def received(self, replica: Replica, message: Message, now: float) -> None:
        """Take a part, or ask again later."""
        job, identity = self._job, self._replicas.identity
        assert job is not None, "only parts of a job are asked for"
        assert job.rows is not None, "and only when there is room for them"
        assert identity is not None, "of a teacher that is known"
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
            begin, rows = payloads.read_head(message, identity)
        except TeacherError as error:
            replica.connection.die(f"it sent no rows of a head: {error}")
            return
        place = job.arrived - job.begin
        if begin != job.arrived or rows.shape[0] > job.end - job.arrived:
            replica.connection.die("it sent other rows of its head than were asked for")
            return
        job.rows[place : place + rows.shape[0]] = rows
        job.arrived += rows.shape[0]
        if job.arrived == job.end:
            self._job = None
            job.done.set()

    def _cancel(self) -> None:
        if self._asked is not None:
            number, replica, num_bytes = self._asked
            replica.connection.cancel(number, wire.NO_KEY)
            replica.connection.settle(num_bytes)
        self._job = self._asked = None
