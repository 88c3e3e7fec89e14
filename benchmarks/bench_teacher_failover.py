"""Measure what a training notices when a teacher replica is killed or hangs, and a peer.

Three replicas, processes of their own, that sleep for as long as a forward would take, so that two
cores are enough. The peer asks a fixed replica for each sequence, waits for a timeout, and asks the
same replica again, with growing pauses where nobody listens: what TRL's and verl's teacher clients
do. Its timeout is shortened from verl's 600 s, which favours it, and it looks ahead as far as ours.
A supervisor starts a killed replica again after some seconds; a hung one goes on after as many.
"""

import argparse
import multiprocessing
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq
from numpy.typing import NDArray

from megatron_mlr1.ending import clean_exit
from megatron_mlr1.teacher import payloads
from megatron_mlr1.teacher.client import ClientOptions, ServedTeacher
from megatron_mlr1.teacher.connection import Address, Connection, Phase, Wanted
from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.pool import AddressPool
from megatron_mlr1.teacher.replica import Replica, ReplicaOptions
from megatron_mlr1.teacher.replicas import Access
from megatron_mlr1.teacher.spec import TargetRequest, Targets, TargetSpec, TeacherIdentity
from megatron_mlr1.teacher.wire import Kind

RESULT: Final = Path(__file__).parent / "results" / "teacher_failover.md"
ROWS: Final = 256
DEPTH: Final = 8
REPLICAS: Final = 3
SERVICE_S: Final = 0.03
STEP_S: Final = 0.02
EVENT_STEP: Final = 60
BACK_AFTER_S: Final = 5.0
PEER_TIMEOUT_S: Final = 5.0
DELAYED_S: Final = 0.05
"""A step that waited longer was delayed."""
EVENTS: Final = {"nothing happens": None, "kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
IDENTITY: Final = TeacherIdentity(
    fingerprint="0" * 32,
    name="sleeper",
    tokenizer_sha256="0" * 64,
    vocab_size=1000,
    hidden_size=1024,
    dtype="bfloat16",
    numerics="none",
)


class Sleeper:
    """A teacher that takes its time and knows nothing."""

    identity = IDENTITY
    max_tokens = ROWS

    def refuse(self, request: TargetRequest) -> None:
        """Refuse nothing."""

    def targets(self, request: TargetRequest, key: bytes) -> Targets:
        """Sleep, and give the tokens back in the place of states."""
        time.sleep(SERVICE_S)
        rows = np.repeat(request.tokens.astype("<u2")[:, None], IDENTITY.hidden_size, axis=1)
        return Targets(request.spec, {"hidden": rows})

    def head_rows(self, begin: int, end: int) -> NDArray[Any]:
        """Give zeros."""
        return np.zeros((end - begin, IDENTITY.hidden_size), "<u2")


def serve(name: str, endpoint: str) -> None:
    """Be a replica."""
    Replica(Sleeper(), ReplicaOptions(name=name, bind=endpoint)).run()


class Pool:
    """Replicas at fixed addresses, and what befalls them."""

    def __init__(self) -> None:
        """Start them."""
        self._context = multiprocessing.get_context("spawn")
        self.endpoints = [f"tcp://127.0.0.1:{free_port()}" for _ in range(REPLICAS)]
        self._processes = [self._start(place) for place in range(REPLICAS)]
        self._return: threading.Timer | None = None

    def _start(self, place: int) -> Any:
        words = f"r{place}", self.endpoints[place]
        process = self._context.Process(target=serve, args=words, daemon=True)
        process.start()
        return process

    def strike(self, number: signal.Signals) -> None:
        """Kill or stop the first replica."""
        os.kill(self._processes[0].pid, number)
        self._return = threading.Timer(BACK_AFTER_S, self._bring_back)
        self._return.start()

    def _bring_back(self) -> None:
        if self._processes[0].is_alive():
            os.kill(self._processes[0].pid, signal.SIGCONT)
        else:
            self._processes[0] = self._start(0)

    def await_return(self) -> None:
        """Wait until the first replica is back."""
        if self._return is not None:
            self._return.join()
            self._return = None

    def close(self) -> None:
        """End all."""
        self.await_return()
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()


def free_port() -> int:
    """Find a port that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def sequence(number: int) -> TargetRequest:
    """Make a sequence; no two are the same."""
    tokens = (np.arange(ROWS, dtype="<i4") + number * 7) % 1000
    tokens[0], tokens[1] = number % 1000, number // 1000
    return TargetRequest(tokens, np.array([0, ROWS], "<i4"), TargetSpec())


type Fetch = Callable[[int], Targets]
"""Gives the targets of a step, having asked for those of the next ones."""


@contextmanager
def our_client(pool: Pool, first: int) -> Iterator[Fetch]:
    """Fetch by the client of this package."""
    access = Access(pool=AddressPool(tuple(pool.endpoints)))
    client = ServedTeacher(access, ClientOptions(start_timeout_s=30))
    tickets: list[Any] = []

    def fetch(step: int) -> Targets:
        while len(tickets) <= step + DEPTH:
            request = sequence(first + len(tickets))
            tickets.append(client.submit(request, len(tickets)))
        return client.fetch(tickets[step], 60)

    try:
        while client.statistics().get("replicas", 0) < REPLICAS:
            time.sleep(0.05)
        yield fetch
    finally:
        client.close()


class Peer:
    """Waits for a timeout and asks the same replica again."""

    def __init__(self, pool: Pool, first: int) -> None:
        """Connect to all replicas."""
        self._first = first
        self._context = zmq.Context()
        self._endpoints = pool.endpoints
        self._connections = [self._connect(place) for place in range(REPLICAS)]
        self._asked: dict[int, float] = {}
        self._came: dict[int, Targets] = {}
        self._pauses = [0.5] * REPLICAS
        """Before the next try, of each replica; twice as long each time, as urllib3's Retry has."""
        self._again_at = [0.0] * REPLICAS
        self._next = 0

    def _connect(self, place: int) -> Connection:
        address = Address(f"r{place}", self._endpoints[place], None)
        return Connection(self._context, address, None, Wanted(), "peer", time.monotonic())

    def fetch(self, step: int) -> Targets:
        """Give the targets of a step."""
        while self._next <= step + DEPTH:
            self._asked[self._next] = 0.0
            self._next += 1
        while step not in self._came:
            self.turn(0.01)
        return self._came.pop(step)

    def turn(self, timeout_s: float) -> None:
        """Send what is due, and take what has come."""
        now = time.monotonic()
        for step, asked_at in self._asked.items():
            connection = self._connections[step % REPLICAS]
            is_due = asked_at == 0.0 or now - asked_at > PEER_TIMEOUT_S
            if is_due and connection.phase is Phase.SERVING:
                request = sequence(self._first + step)
                key = content_key(IDENTITY, request)
                frames = payloads.submit_frames(request, 1000)
                connection.submit(step + 1, key, frames, 2 * ROWS * IDENTITY.hidden_size)
                self._asked[step] = now
        time.sleep(min(timeout_s, 0.002))
        for place, connection in enumerate(self._connections):
            if connection.is_dead and now >= self._again_at[place]:
                # Nobody listens: the same address again, later and later.
                self._again_at[place] = now + self._pauses[place]
                self._pauses[place] *= 2
                self._connections[place] = self._connect(place)
                for step in self._asked:
                    if step % REPLICAS == place:
                        self._asked[step] = 0.0
            for message in connection.receive(now):
                if message.kind is Kind.DATA and message.request - 1 in self._asked:
                    step = message.request - 1
                    connection.settle(2 * ROWS * IDENTITY.hidden_size)
                    spec = TargetSpec()
                    self._came[step] = payloads.read_data(message, spec, IDENTITY, ROWS)
                    del self._asked[step]

    @property
    def is_connected(self) -> bool:
        """Whether all replicas serve."""
        return all(one.phase is Phase.SERVING for one in self._connections)

    def close(self) -> None:
        """Close all."""
        for connection in self._connections:
            connection.die("done")
        self._context.term()


@contextmanager
def peer_client(pool: Pool, first: int) -> Iterator[Fetch]:
    """Fetch by the peer."""
    peer = Peer(pool, first)
    while not peer.is_connected:
        peer.turn(0.05)
    try:
        yield peer.fetch
    finally:
        peer.close()


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds that the steps after the event waited."""

    waits: list[float]

    @property
    def delayed(self) -> int:
        """Steps that waited longer than a step may."""
        return sum(wait > DELAYED_S for wait in self.waits)

    def quantile(self, share: float) -> float:
        """Give a quantile in milliseconds."""
        ordered = sorted(self.waits)
        return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def measure(
    pool: Pool, client: Any, first: int, event: signal.Signals | None, steps: int
) -> Figures:
    """Train with one client through one event, on sequences from the number `first` on."""
    waits = []
    with client(pool, first) as fetch:
        for step in range(steps):
            if step == EVENT_STEP and event is not None:
                pool.strike(event)
            begin = time.perf_counter()
            targets = fetch(step)
            waits.append(time.perf_counter() - begin)
            assert np.array_equal(targets.arrays["hidden"][:, 0], sequence(first + step).tokens)
            time.sleep(STEP_S)
    pool.await_return()
    return Figures(waits[EVENT_STEP - 5 :])


def table(figures: dict[tuple[str, str], Figures], steps: int, load: float) -> str:
    """Give the waits as Markdown."""
    lines = [
        "# The death of a teacher replica",
        "",
        f"{REPLICAS} replicas that take {1000 * SERVICE_S:.0f} ms for a sequence, a training that "
        f"takes {1000 * STEP_S:.0f} ms for a step of one and looks {DEPTH} ahead: after one death "
        f"there is still spare capacity. The first replica is struck before step {EVENT_STEP} of "
        f"{steps} and is back {BACK_AFTER_S:.0f} s later. Waits of the steps from then on.",
        "",
        "| | | p50 ms | p99 ms | longest wait ms | delayed steps |",
        "|---|---|---|---|---|---|",
    ]
    for (event, name), one in figures.items():
        lines.append(
            f"| {event} | {name} | {one.quantile(0.5):.1f} | {one.quantile(0.99):.1f} "
            f"| {one.quantile(1):,.0f} | {one.delayed} |"
        )
    lines += [
        "",
        f"A step is delayed when it waited longer than {1000 * DELAYED_S:.0f} ms. The peer asks "
        "the same replica again: at once and then after growing pauses where nobody listens, "
        f"after {PEER_TIMEOUT_S:.0f} s where no answer comes (verl: 600 s). Every target was "
        "compared with what it must be.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, load before the start {load:.1f}; Python "
        f"{platform.python_version()}, pyzmq {version('pyzmq')}.",
        "",
        "Measured by `python -m benchmarks.bench_teacher_failover --save`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULT.name}")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    figures: dict[tuple[str, str], Figures] = {}
    pool = Pool()
    try:
        for event, number in EVENTS.items():
            for name, client in (("ours", our_client), ("peer: same replica", peer_client)):
                first = 2 * options.steps * len(figures)  # replicas remember old answers
                figures[event, name] = measure(pool, client, first, number, options.steps)
    finally:
        pool.close()
    text = table(figures, options.steps, load)
    print(text)
    if options.save:
        RESULT.write_text(text, "utf-8")


if __name__ == "__main__":
    with clean_exit():
        main()
