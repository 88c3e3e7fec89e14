"""Starts one replica for each device, starts it again when it ends, and drains them all."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from megatron_mlr1.errors import Mlr1Error, TeacherError
from megatron_mlr1.teacher.pool import make_pool
from megatron_mlr1.teacher.ports import refuse_taken
from megatron_mlr1.teacher.serving import ServePlan, addresses, place_of

LOOK_S: Final = 0.2
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
GOOD_LIFE_S: Final = 60.0
"""A replica that lived so long is started again without a pause."""
KILL_AFTER_S: Final = 15.0
"""A replica that has not ended so long after its drain must have is killed."""


@dataclass(eq=False, slots=True)
class Child:
    """One place for a replica: a device and an address."""

    index: int
    process: subprocess.Popen[str] | None = None
    started: float = 0.0
    start_again_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    has_served: bool = False


class Supervisor:
    """Runs the replicas of one machine until it is asked to drain."""

    def __init__(self, plan: ServePlan, say: Callable[[str], None]) -> None:
        """Prepare.

        Args:
            plan: what to serve, and where.
            say: takes lines for a person, from several threads.
        """
        self._plan, self._say = plan, say
        self._children = [Child(index) for index in range(len(plan.devices))]
        # No `Event`: a signal's handler that sets what its own thread waits for may stop both.
        self._drain_asked = False

    def drain(self) -> None:
        """Let every replica finish what it accepted; from any thread or a signal's handler."""
        self._drain_asked = True

    def run(self) -> None:
        """Serve until drained.

        Raises:
            TeacherError: a replica could not start for a reason that no restart mends.
            MachineError: the pool cannot be written, or an address cannot be bound.
        """
        if self._plan.pool is not None:
            make_pool(self._plan.pool)
        refuse_taken(addresses(self._plan))
        try:
            while not self._drain_asked:
                for child in self._children:
                    self._look_at(child)
                time.sleep(LOOK_S)
        finally:
            self._end()

    def _look_at(self, child: Child) -> None:
        now = time.monotonic()
        if child.process is None:
            if now >= child.start_again_at:
                self._start(child)
            return
        code = child.process.poll()
        if code is None:
            return
        child.process = None
        if code == Mlr1Error.exit_code and not child.has_served:
            raise TeacherError(
                f"the replica on {self._plan.devices[child.index]} cannot start; its reason is "
                "above. Mend that and start again."
            )
        if now - child.started >= GOOD_LIFE_S:
            child.pause_s = FIRST_PAUSE_S
        pause_s = 0.0 if code == 0 else child.pause_s
        child.pause_s = min(child.pause_s * 2, LONGEST_PAUSE_S)
        child.start_again_at = now + pause_s
        self._say(
            f"replica {child.index} ended with {_ending(code)} after {now - child.started:.0f} s; "
            f"it starts again in {pause_s:.0f} s"
        )

    def _start(self, child: Child) -> None:
        place = place_of(self._plan, child.index)
        words = [sys.executable, "-m", "megatron_mlr1.teacher.process", json.dumps(place)]
        # The child drains when its standard input ends, so none outlives a killed supervisor.
        child.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(len(self._children)),
            start_new_session=True,
        )
        child.started = time.monotonic()
        reader = threading.Thread(target=self._read, args=(child, child.process), daemon=True)
        reader.start()

    def _read(self, child: Child, process: subprocess.Popen[str]) -> None:
        """Pass on what a replica says; its first line says that it serves."""
        assert process.stdout is not None, "the replica's output is a pipe"
        for line in process.stdout:
            child.has_served = True
            self._say(line.rstrip())

    def _end(self) -> None:
        processes = [child.process for child in self._children if child.process is not None]
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        until = time.monotonic() + self._plan.drain_s + KILL_AFTER_S
        for process in processes:
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                self._say(f"process {process.pid} did not drain and is killed")
                process.kill()
            # A replica that has not served yet ends by the signal itself.
            if process.wait() not in (0, -signal.SIGTERM):
                self._say(f"process {process.pid} ended with {_ending(process.returncode)}")


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _environment(num_replicas: int) -> dict[str, str]:
    """Give the replicas their share of the cores, and cuBLAS a workspace that fixes its results."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    shared = {
        "OMP_NUM_THREADS": str(max(1, cores // num_replicas)),
        # NVIDIA's cuBLAS documentation, "Results reproducibility".
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    return shared | dict(os.environ)
