"""The student's side of a served teacher: one object for the training, one thread for the sockets.

The training's thread submits and fetches; it never touches a socket. Everything else runs in one
thread of this process: connections to all replicas, asking, comparing, failing over.
"""

import itertools
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import numpy as np
import zmq
from numpy.typing import NDArray

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.backend import (
    Statistics,
    TeacherUnavailable,
    Ticket,
    outside_of_vocabulary,
    refuse_rows,
)
from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.dispatch import Dispatcher, DispatchOptions
from megatron_mlr1.teacher.head import HeadDesk, HeadJob
from megatron_mlr1.teacher.replicas import Access, Replica, Replicas
from megatron_mlr1.teacher.spec import TargetRequest, Targets, TeacherIdentity, bytes_per_token
from megatron_mlr1.teacher.tickets import TicketTable, Work

POLL_MS: Final = 20
"""The thread looks so often for what no message tells it: late answers, silent replicas."""
PUBLISH_S: Final = 0.5
"""Between two counts of the replicas."""
HEAD_TIMEOUT_S: Final = 300.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientOptions:
    """What a run chooses of its client."""

    dispatch: DispatchOptions = field(default_factory=DispatchOptions)
    audit_every: int = 1000
    """Every so many requests one goes to two replicas, which must answer alike; 0 for none."""
    start_timeout_s: float = 60.0
    """The first replica must have answered by then."""
    pinned: bool = False
    """Whether targets are to lie in memory from which a GPU copies without waiting."""


class ServedTeacher:
    """A pool of replicas as one teacher."""

    def __init__(self, access: Access, options: ClientOptions) -> None:
        """Start the thread and wait for the first replica.

        Raises:
            TeacherError: no replica fits this student: other keys, tokenizer or vocabulary.
            TeacherUnavailable: none answered in time.
        """
        self._options = options
        random = Random(os.urandom(8))
        numbers = itertools.count(1)
        self._table = TicketTable()
        self._replicas = Replicas(access, random)
        self._dispatcher = Dispatcher(
            self._table,
            self._replicas,
            options.dispatch,
            numbers,
            random,
            _pinned if options.pinned else _as_received,
        )
        self._heads = HeadDesk(self._replicas, numbers, self._dispatcher.eject)
        self._inbox: deque[Callable[[float], None]] = deque()
        self._wake_here, self._wake_there = socket.socketpair()
        self._wake_here.setblocking(False)
        self._wake_there.setblocking(False)
        self._poller, self._watched = zmq.Poller(), dict[Any, Replica]()
        self._published: dict[str, float] = {}
        self._publish_at = 0.0
        self._known = threading.Event()
        self._closing = False
        self._fault: TeacherError | None = None
        self._thread = threading.Thread(target=self._run, name="teacher-client", daemon=True)
        self._thread.start()
        try:
            self._identity = self._await_teacher()
        except TeacherError:
            self.close()
            raise

    @property
    def identity(self) -> TeacherIdentity:
        """Say who answers; all replicas are the same teacher."""
        return self._identity

    def submit(self, request: TargetRequest, deadline: int) -> Ticket:
        """Ask for the targets of one sequence; does not wait.

        Raises:
            TeacherError: a token is outside of the vocabulary, or the buffer is smaller than the
                targets.
        """
        if request.tokens.max() >= self._identity.vocab_size:
            raise outside_of_vocabulary(request, self._identity)
        num_bytes = request.rows * bytes_per_token(request.spec, self._identity)
        if num_bytes > self._options.dispatch.buffer_bytes:
            raise TeacherError(
                f"the targets of one sequence have {num_bytes:,} bytes and the buffer has "
                f"{self._options.dispatch.buffer_bytes:,}; it must hold at least all that is asked "
                "for ahead. Give it more, or choose a smaller form of targets."
            )
        every = self._options.audit_every
        is_audited = every > 0 and self._table.num_opened % every == 0
        key = content_key(self._identity, request)
        ticket, work = self._table.open(key, request, deadline, num_bytes, is_audited)
        if work is not None:
            self._tell(lambda now: self._dispatcher.add(work))
        return ticket

    def ready(self, ticket: Ticket) -> bool:
        """Say whether `fetch` would not wait.

        Raises:
            TeacherError: the targets cannot be had at all.
        """
        return self._table.ready(ticket)

    def fetch(self, ticket: Ticket, timeout_s: float) -> Targets:
        """Give the targets, once; the caller may keep them as long as it likes.

        Raises:
            TeacherUnavailable: they did not come in time; the ticket is still good.
            TeacherError: they cannot be had at all.
        """
        targets, work = self._table.take(ticket, timeout_s)
        self._let_go(work)
        return targets

    def drop(self, ticket: Ticket) -> None:
        """Give up the targets of a ticket; the replicas are told."""
        self._let_go(self._table.drop(ticket))

    def head(self, begin: int, end: int) -> NDArray[Any]:
        """Give rows [begin, end) of the teacher's head; two replicas agree, if there are two.

        Raises:
            TeacherUnavailable: no replica gave them in time.
            TeacherError: they are outside of the head, or the replicas contradict each other.
        """
        refuse_rows(begin, end, self._identity)
        job = HeadJob(begin, end)
        self._tell(lambda now: self._heads.begin(job))
        if not job.done.wait(HEAD_TIMEOUT_S):
            raise TeacherUnavailable(
                f"rows [{begin}, {end}) of the teacher's head did not come in {HEAD_TIMEOUT_S:.0f} "
                f"s. {self._who_is_there()} Start replicas."
            )
        if job.error is not None:
            raise job.error
        assert job.rows is not None, "a job that is done has its rows"
        return job.rows

    def statistics(self) -> Statistics:
        """Count what happened; by replica as it was at most half a second ago.

        requests, wait_ms (of the training, all told), in_flight_bytes, peak_bytes; asked, hedges,
        failovers, duplicates, lost, busy, failed, taken_back, quarantined, audits, audits_alone,
        audit_mismatches, disowned, ejected; replicas, and of each NAME/tokens_per_s, NAME/p50_ms,
        NAME/p99_ms, NAME/in_flight.
        """
        return {
            "requests": self._table.num_opened,
            "wait_ms": 1000 * self._table.wait_s,
            "in_flight_bytes": self._dispatcher.used_bytes,
            "peak_bytes": self._dispatcher.peak_bytes,
            "ejected": len(self._replicas.ejected),
            **dict(self._dispatcher.counts),
            **self._published,
        }

    def close(self) -> None:
        """End the thread and close all connections; open tickets are void."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        self._wake_here.close()
        self._wake_there.close()

    def _let_go(self, work: Work | None) -> None:
        if work is not None:
            self._tell(lambda now: self._dispatcher.served(work, now))

    def _tell(self, message: Callable[[float], None]) -> None:
        self._inbox.append(message)
        self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it has been woken often enough
            self._wake_here.send(b"\0")

    def _await_teacher(self) -> TeacherIdentity:
        self._known.wait(self._options.start_timeout_s)
        if self._fault is not None:
            raise self._fault
        identity = self._replicas.identity
        if identity is not None:
            return identity
        if self._replicas.all_refused:
            raise TeacherError(
                f"no teacher answers this student. {self._who_is_there()} Give this run the "
                "address, the keys and the tokenizer of its teacher's pool."
            )
        raise TeacherUnavailable(
            f"no teacher answers. {self._who_is_there()} Start replicas with "
            "tools/serve_teacher.py, and give this run the pool's address and keys."
        )

    def _who_is_there(self) -> str:
        reasons = [
            f"{where}: {why.rstrip('.')}." for where, why in sorted(self._replicas.reasons.items())
        ]
        return " ".join(reasons) or f"The pool has no members. {self._replicas.remarks()}"

    # The client's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except Exception as error:  # the last line: without this thread nobody would answer
            _log.exception("the teacher's client has failed")
            self._fault = TeacherError(f"the teacher's client has failed: {error!r}")
            self._table.fail(self._fault)
        finally:
            self._replicas.close()
            self._known.set()

    def _turn(self) -> None:
        self._watch()
        events = dict(self._poller.poll(POLL_MS))
        if self._wake_there.fileno() in events:
            self._wake_there.recv(4096)
        now = time.monotonic()
        while self._inbox:
            self._inbox.popleft()(now)
        for replica in {id(one): one for one in map(self._watched.get, events) if one}.values():
            for message in replica.connection.receive(now):
                if self._heads.owns(message.request):
                    self._heads.received(replica, message, now)
                else:
                    self._dispatcher.received(replica, message, now)
            self._replicas.greeted(replica)
        for replica in self._replicas.living.values():
            replica.connection.tick(now)
        self._dispatcher.turn(now)
        self._heads.turn(now)
        self._replicas.rescan(now)
        if self._replicas.identity is not None or self._replicas.all_refused:
            self._known.set()
        is_news = len(self._replicas.serving()) != self._published.get("replicas", 0)
        if now >= self._publish_at or is_news:
            self._publish_at = now + PUBLISH_S
            self._published = self._count_replicas()

    def _watch(self) -> None:
        """Poll exactly the sockets that are open."""
        sockets = dict(self._replicas.sockets())
        if sockets.keys() != self._watched.keys() or not self._poller.sockets:
            self._watched, self._poller = sockets, zmq.Poller()
            self._poller.register(self._wake_there.fileno(), zmq.POLLIN)
            for one in sockets:
                self._poller.register(one, zmq.POLLIN)

    def _count_replicas(self) -> dict[str, float]:
        serving = self._replicas.serving()
        figures: dict[str, float] = {"replicas": len(serving)}
        for replica in serving:
            load = replica.load
            figures[f"{replica.name}/in_flight"] = load.num_outstanding
            figures[f"{replica.name}/tokens_per_s"] = load.tokens_per_s or 0.0
            for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99)):
                figures[f"{replica.name}/{name}"] = 1000 * (load.quantile(share) or 0.0)
        return figures


def _as_received(targets: Targets) -> Targets:
    return targets


def _pinned(targets: Targets) -> Targets:
    """Copy targets into pinned memory, which torch keeps and uses again."""
    import torch

    arrays: dict[str, NDArray[Any]] = {}
    for name, array in targets.arrays.items():
        block = torch.empty(array.nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        arrays[name] = block.view(array.dtype).reshape(array.shape)
        np.copyto(arrays[name], array)
    return Targets(targets.spec, arrays)
