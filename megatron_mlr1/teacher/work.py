"""What a replica has to compute, what it has computed, and who waits for it: no sockets here."""

import heapq
import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from megatron_mlr1.teacher.spec import TargetRequest, Targets


@dataclass(frozen=True, slots=True)
class Waiter:
    """One student's request for a result."""

    student: bytes
    request: int
    arrived: float
    """Seconds of the monotonic clock."""
    num_bytes: int
    """Of the reply."""


@dataclass(eq=False, slots=True)
class Job:
    """One computation, for all who wait for it."""

    key: bytes
    request: TargetRequest
    deadline: float
    waiters: dict[tuple[bytes, int], Waiter] = field(default_factory=dict)
    taken: bool = False
    """Whether its computation has begun."""


class WorkQueue:
    """Jobs in the order of their deadlines, each content key once; bounded in tokens.

    The I/O thread adds, cancels and finishes; the compute thread takes.
    """

    def __init__(self, max_tokens: int) -> None:
        """Make an empty queue of at most `max_tokens` tokens, or of one longer request."""
        self._max_tokens = max_tokens
        self._jobs: dict[bytes, Job] = {}
        self._heap: list[tuple[float, int, Job]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._stopped = False
        self.tokens = 0
        """Tokens of all jobs, the running one too."""

    def __len__(self) -> int:
        return len(self._jobs)

    def has_room(self, key: bytes, rows: int) -> bool:
        """Say whether a request fits; one that joins a job always does."""
        return key in self._jobs or not self._jobs or self.tokens + rows <= self._max_tokens

    def add(self, key: bytes, request: TargetRequest, deadline: float, waiter: Waiter) -> bool:
        """Queue a request, or join the job with its key; True where it joined."""
        with self._changed:
            job = self._jobs.get(key)
            joins = job is not None
            if job is None:
                job = self._jobs[key] = Job(key, request, deadline)
                self.tokens += request.rows
            job.waiters[waiter.student, waiter.request] = waiter
            if (not joins or deadline < job.deadline) and not job.taken:
                job.deadline = deadline
                heapq.heappush(self._heap, (deadline, next(self._order), job))
                self._changed.notify()
            return joins

    def cancel(self, key: bytes, student: bytes, request: int) -> Waiter | None:
        """Take a waiter away, and a job that nobody waits for unless it runs already."""
        with self._changed:
            job = self._jobs.get(key)
            waiter = None if job is None else job.waiters.pop((student, request), None)
            if job is not None and not job.waiters and not job.taken:
                self._forget(job)
            return waiter

    def take(self) -> Job | None:
        """Wait for the most urgent job; None after `stop`."""
        with self._changed:
            while True:
                while self._heap:
                    _, _, job = heapq.heappop(self._heap)
                    # A job may stand in the heap twice, or have been cancelled.
                    if self._jobs.get(job.key) is job and not job.taken:
                        job.taken = True
                        return job
                if self._stopped:
                    return None
                self._changed.wait()

    def finish(self, job: Job) -> list[Waiter]:
        """Take a job that was computed off the queue, and give those who wait for it."""
        with self._changed:
            self._forget(job)
            return list(job.waiters.values())

    def stop(self) -> None:
        """Let `take` give None once the jobs are done."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _forget(self, job: Job) -> None:
        del self._jobs[job.key]
        self.tokens -= job.request.rows


class ResultRing:
    """The last results by content key: a second student, or a second try, costs nothing."""

    def __init__(self, max_bytes: int) -> None:
        """Keep at most `max_bytes`; the result that was used longest ago goes first."""
        self._max_bytes = max_bytes
        self._results: OrderedDict[bytes, Targets] = OrderedDict()
        self._num_bytes = 0

    def put(self, key: bytes, targets: Targets) -> None:
        """Keep a result, if it fits at all."""
        if targets.num_bytes > self._max_bytes or key in self._results:
            return
        self._results[key] = targets
        self._num_bytes += targets.num_bytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._results.popitem(last=False)
            self._num_bytes -= oldest.num_bytes

    def get(self, key: bytes) -> Targets | None:
        """Give a result that is still there."""
        targets = self._results.get(key)
        if targets is not None:
            self._results.move_to_end(key)
        return targets
