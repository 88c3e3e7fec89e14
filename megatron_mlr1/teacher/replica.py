"""One replica: a teacher on one device behind a ZeroMQ ROUTER socket.

The thread that calls `run` does all input and output; a second one computes, one request at a
time in the order of the deadlines, never several in one batch: the shape of a computation, and so
its bits, depend on the request alone.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_mlr1.errors import MachineError, Mlr1Error
from megatron_mlr1.teacher.desk import Desk
from megatron_mlr1.teacher.engine import Engine, RequestError
from megatron_mlr1.teacher.keys import PoolKeys
from megatron_mlr1.teacher.pool import Lease, LeaseKeeper, join
from megatron_mlr1.teacher.ports import Ports
from megatron_mlr1.teacher.spec import Targets
from megatron_mlr1.teacher.wire import Code, Limits
from megatron_mlr1.teacher.work import Job, WorkQueue

MAX_FAILURES: Final = 3
"""A device that failed so often in a row is given up; the supervisor starts a new process."""
TICK_MS: Final = 100

FAREWELL_S: Final = 0.3
"""A replica that drains hears its students so much longer: what they sent before they knew is told
to go elsewhere, where a closed socket would let them wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaOptions:
    """How a replica serves."""

    name: str
    """Unlike any other of the pool."""
    bind: str
    """ZeroMQ address; port 0 takes a free one."""
    advertise: str | None = None
    """Host that students connect to; None takes it from `bind`."""
    data_bind: str | None = None
    """Address of an open port on a trusted network, for sealed but unencrypted replies."""
    keys: PoolKeys | None = None
    """None serves anyone who reaches the address: only on 127.0.0.1 or ipc."""
    pool: Path | None = None
    """Folder for the lease."""
    max_queue_tokens: int = 262_144
    """Accepted and not computed; beyond it the answer is BUSY."""
    held_bytes: int = 2 * 2**30
    """Replies that wait for credit, and as much again of kept results."""
    drain_s: float = 120.0
    """A replica that drains waits at most so long for its students to take what they asked for."""


class Replica:
    """Serves one engine until it is drained."""

    def __init__(self, engine: Engine, options: ReplicaOptions) -> None:
        """Bind the sockets and join the pool.

        Raises:
            MachineError: the address cannot be bound, or the pool cannot be written.
            TeacherError: the pool has another teacher.
        """
        self._engine, self._options = engine, options
        limits = Limits(max_tokens=engine.max_tokens)
        self._ports = Ports(options.bind, options.data_bind, options.keys, limits)
        self.endpoint = self._ports.endpoint(options.advertise)
        """Where students connect."""
        if options.pool is not None:
            try:
                join(options.pool, options.name, engine.identity.fingerprint)
            except Mlr1Error:
                self._ports.close()
                raise
        self._queue = WorkQueue(options.max_queue_tokens)
        self._desk = Desk(options.name, engine, self._ports, self._queue, options.held_bytes)
        self._desk.data_endpoint = self._ports.data_endpoint(options.advertise)
        self._results: deque[tuple[Job, Targets | RequestError, float]] = deque()
        self._failures = 0
        self._fault: BaseException | None = None
        self._drain_asked = False

    def drain(self) -> None:
        """Finish what is accepted, refuse the rest, then let `run` return. From any thread."""
        self._drain_asked = True
        self._ports.wake()

    def run(self) -> None:
        """Serve until drained.

        Raises:
            MachineError: the device failed several times in a row, or the pool cannot be written.
            TeacherError: the pool went over to another teacher.
        """
        compute = threading.Thread(target=self._compute, name="teacher-compute")
        compute.start()
        lease = None
        try:
            if self._options.pool is not None:
                lease = LeaseKeeper(self._options.pool, self._lease())
            while self._fault is None and not self._drain_asked:
                if lease is not None:
                    lease.keep()
                self._tick()
            if lease is not None:
                lease.give_up()
            self._desk.begin_drain()
            until = time.monotonic() + self._options.drain_s
            farewell = time.monotonic() + FAREWELL_S if self._desk.has_students else 0.0
            while self._fault is None and (now := time.monotonic()) < until:
                if self._desk.is_idle and now >= farewell:
                    break
                self._tick()
            self._desk.settle()
        finally:
            if lease is not None:
                lease.give_up()
            self._queue.stop()
            self._ports.close()
            compute.join()
        if self._fault is not None:
            raise self._fault

    def _tick(self) -> None:
        self._ports.receive(TICK_MS, self._desk.on_message, self._desk.on_data_port)
        while self._results:
            self._desk.deliver(*self._results.popleft())
        self._desk.settle()

    def _lease(self) -> Lease:
        keys = self._options.keys
        return Lease(
            name=self._options.name,
            endpoint=self.endpoint,
            fingerprint=self._engine.identity.fingerprint,
            public_key="" if keys is None else keys.pair.public.decode(),
        )

    def _compute(self) -> None:
        try:
            while (job := self._queue.take()) is not None:
                begin = time.monotonic()
                result = self._answer(job)
                self._results.append((job, result, time.monotonic() - begin))
                self._ports.wake()
        except BaseException as error:  # the last line: without this thread the replica is none
            self._fault = error
            self._ports.wake()

    def _answer(self, job: Job) -> Targets | RequestError:
        try:
            targets = self._engine.targets(job.request, job.key)
        except RequestError as error:
            return error
        except RuntimeError as error:  # torch: out of memory, a fault of the device
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                raise MachineError(
                    f"the device failed {self._failures} times in a row, at last with: {error}. "
                    "Look at the device and at what else uses its memory."
                ) from error
            return RequestError(Code.FAILED, f"the teacher failed at this request: {error}")
        self._failures = 0
        return targets
