"""A small proxy between a student and a replica that loses, delays and repeats messages."""

import heapq
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import zmq

from megatron_mlr1.teacher.wire import Kind

CONCERNED = {Kind.SUBMIT, Kind.ACCEPT, Kind.DATA, Kind.CANCEL}
"""Greetings and signs of life pass; losing those is what a dead replica is for."""


class Proxy:
    """Forwards one student's messages; it runs in a thread and is no ZeroMQ device."""

    def __init__(self, endpoint: str, seed: int, losses: int) -> None:
        """Stand before a replica.

        Args:
            endpoint: of the replica.
            seed: decides what happens to which message.
            losses: messages that are lost at most.
        """
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._back = self._context.socket(zmq.DEALER)
        port = self._front.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._back.connect(endpoint)
        self._random, self._losses = Random(seed), losses
        self.counts: Counter[str] = Counter()
        self._later: list[tuple[float, int, zmq.Socket[bytes], list[bytes]]] = []
        self._order = itertools.count()
        self._ends = threading.Event()
        self._student = b""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._ends.set()
        self._thread.join()
        self._context.destroy(0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        while not self._ends.is_set():
            ready = dict(poller.poll(5))
            if self._front in ready:
                self._student, *parts = self._front.recv_multipart()
                self._pass(self._back, parts)
            if self._back in ready:
                self._pass(self._front, self._back.recv_multipart())
            while self._later and self._later[0][0] <= time.monotonic():
                _, _, socket, parts = heapq.heappop(self._later)
                self._send(socket, parts)

    def _pass(self, socket: zmq.Socket[bytes], parts: list[bytes]) -> None:
        chance = self._random.random() if parts[0][5] in CONCERNED else 1.0
        is_needed = parts[0][5] in (Kind.SUBMIT, Kind.DATA)
        if chance < 0.1 and is_needed and self.counts["lost"] < self._losses:
            self.counts["lost"] += 1
            return
        if chance < 0.3:
            self.counts["delayed"] += 1
            until = time.monotonic() + self._random.uniform(0.01, 0.2)
            heapq.heappush(self._later, (until, next(self._order), socket, parts))
            return
        if chance < 0.5:
            self.counts["repeated"] += 1
            self._send(socket, parts)
        self._send(socket, parts)

    def _send(self, socket: zmq.Socket[bytes], parts: list[bytes]) -> None:
        socket.send_multipart([self._student, *parts] if socket is self._front else parts)


@contextmanager
def proxy_before(endpoint: str, seed: int, losses: int) -> Iterator[Proxy]:
    """Give a proxy before a replica."""
    proxy = Proxy(endpoint, seed, losses)
    try:
        yield proxy
    finally:
        proxy.close()
