"""A pool of real replica processes for a test, which can be killed, stopped and started again."""

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mlr1.teacher.audit import bits
from megatron_mlr1.teacher.backend import TeacherBackend
from megatron_mlr1.teacher.client import ClientOptions, ServedTeacher
from megatron_mlr1.teacher.pool import FolderPool
from megatron_mlr1.teacher.replicas import Access
from megatron_mlr1.teacher.spec import TargetRequest, TargetSpec, TeacherIdentity
from tests.support.teacher_nursery import Birth

ROOT = Path(__file__).parents[2]
VOCABULARY = 256


class Nursery:
    """Starts replicas of one teacher, each a process of its own."""

    def __init__(self, model: Path) -> None:
        self.model = model
        program = [sys.executable, "-m", "tests.support.teacher_nursery", str(model)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            program,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.identity = TeacherIdentity(**json.loads(self._process.stdout.readline()))

    def bear(self, birth: Birth) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(birth)) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class TestPool:
    """Replicas r0, r1, ... of a nursery in one folder of leases."""

    __test__ = False

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self._nursery, self.folder = nursery, folder
        folder.mkdir()
        self.processes: dict[str, int] = {}
        self._started = 0

    def start(self, **how: Any) -> str:
        """Start one more replica, and wait for its lease."""
        name = f"r{self._started}"
        self._started += 1
        self.processes[name] = self._nursery.bear(
            Birth(**({"name": name, "pool": str(self.folder)} | how))
        )
        wait_until(lambda: (self.folder / f"{name}.lease").exists())
        return name

    def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        del self.processes[name]

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.processes[name], number)

    def close(self) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@contextmanager
def pool_of(nursery: Nursery, folder: Path, count: int, **how: Any) -> Iterator[TestPool]:
    """Give a pool of so many replicas; all of them are gone at the end."""
    pool = TestPool(nursery, folder)
    try:
        for _ in range(count):
            pool.start(**how)
        yield pool
    finally:
        pool.close()


@contextmanager
def client_of(pool: TestPool, **options: Any) -> Iterator[ServedTeacher]:
    """Give a student of a pool."""
    client = ServedTeacher(Access(pool=FolderPool(pool.folder)), ClientOptions(**options))
    try:
        yield client
    finally:
        client.close()


@functools.cache
def shared_nursery() -> Nursery:
    """Give the one nursery of this test run; its teacher is made on the spot."""
    from tests.support.teachers import make_teacher_folder

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    nursery = Nursery(make_teacher_folder(folder / "tiny-llama"))
    atexit.register(nursery.close)
    return nursery


@functools.cache
def reference(count: int, length: int = 48) -> tuple[bytes, ...]:
    """Give what an undisturbed teacher says of the first sequences, as hashes."""
    with tempfile.TemporaryDirectory() as folder:
        pool = TestPool(shared_nursery(), Path(folder) / "pool")
        try:
            pool.start()
            with client_of(pool, audit_every=0) as client:
                return learn(client, range(count), length=length)
        finally:
            pool.close()


def learn(
    teacher: TeacherBackend,
    seeds: Sequence[int],
    *,
    depth: int = 8,
    length: int = 48,
    step_s: float = 0.0,
    disturb: Callable[[int], object] = lambda step: None,
    waits: list[float] | None = None,
) -> tuple[bytes, ...]:
    """Train, as far as a teacher sees it: ask ahead, take in order; give hashes of the targets.

    Args:
        teacher: who is asked.
        seeds: of the sequences.
        depth: sequences that are asked for ahead.
        length: of each sequence.
        step_s: what a step takes besides its targets.
        disturb: called before each step.
        waits: takes the seconds that each step waited.
    """
    hashes, tickets = [], []
    for step in range(len(seeds) + depth):
        if step < len(seeds):
            tickets.append(teacher.submit(sequence(seeds[step], length), step))
        if step < depth:
            continue
        disturb(step - depth)
        begin = time.monotonic()
        hashes.append(bits(teacher.fetch(tickets[step - depth], 120.0)))
        if waits is not None:
            waits.append(time.monotonic() - begin)
        time.sleep(step_s)
    return tuple(hashes)


def wait_until(condition: Any, timeout_s: float = 120.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def sequence(seed: int, length: int = 48, spec: TargetSpec | None = None) -> TargetRequest:
    """Give a sequence of two documents, the same for the same seed."""
    random = np.random.default_rng(seed)
    tokens = random.integers(2, VOCABULARY, length).astype("<i4")
    bounds = np.array([0, length // 3, length], "<i4")
    return TargetRequest(tokens, bounds, spec or TargetSpec())
