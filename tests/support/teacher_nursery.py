"""A process that has loaded a teacher and forks replicas of it, so that one starts in moments.

Run as a program, FOLDER as its word. Reads one JSON object a line: the fields of `Birth`; answers
each with the new replica's process id. Replicas die with it.
"""

import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Birth:
    """How a replica is to be."""

    name: str
    pool: str | None
    bind: str = "tcp://127.0.0.1:*"
    keys: str | None = None
    delay_s: float = 0.0
    """Added to each computation, so that there is something to interrupt."""
    damage: float = 0.0
    """Added to one weight after the fingerprint was taken."""
    damage_head: bool = False
    """Whether one number of its head is another."""
    damage_after: int = 0
    """Answers that it gives before the damage is done."""
    poison: int = -1
    """The process dies of a request that begins with this token."""
    data_bind: str | None = None
    max_queue_tokens: int = 262_144


class Patient:
    """The loaded teacher, slower or ill as the test wants."""

    def __init__(self, teacher: Any, birth: Birth) -> None:
        self._teacher, self._birth = teacher, birth
        self.identity, self.max_tokens = teacher.identity, teacher.max_tokens
        self._num_answers = 0

    def refuse(self, request: Any) -> None:
        self._teacher.refuse(request)

    def targets(self, request: Any, key: bytes) -> Any:
        if request.tokens[0] == self._birth.poison:
            os._exit(1)
        if self._birth.damage and self._num_answers == self._birth.damage_after:
            # The last weight of the body is that of the final norm, so every answer changes.
            list(self._teacher.body.parameters())[-1][0] += self._birth.damage
        self._num_answers += 1
        if self._birth.delay_s:
            time.sleep(self._birth.delay_s)
        return self._teacher.targets(request, key)

    def head_rows(self, begin: int, end: int) -> Any:
        rows = self._teacher.head_rows(begin, end)
        if self._birth.damage_head and begin == 0:
            rows = rows.copy()
            rows[0, 0] += 1
        return rows


def serve(teacher: Any, birth: Birth, parent: int) -> None:
    """Be one replica, in a forked process."""
    from megatron_mlr1.teacher.keys import read_pool_keys
    from megatron_mlr1.teacher.replica import Replica, ReplicaOptions

    death_of_parent = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(death_of_parent, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    replica = Replica(
        Patient(teacher, birth),
        ReplicaOptions(
            name=birth.name,
            bind=birth.bind,
            data_bind=birth.data_bind,
            max_queue_tokens=birth.max_queue_tokens,
            pool=None if birth.pool is None else Path(birth.pool),
            keys=None if birth.keys is None else read_pool_keys(Path(birth.keys)),
        ),
    )
    signal.signal(signal.SIGTERM, lambda *_: replica.drain())
    replica.run()


def main() -> None:
    """Load, then fork on demand."""
    import torch

    from megatron_mlr1.teacher.model import load_teacher

    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    teacher = load_teacher(Path(sys.argv[1]), torch.device("cpu"), "float32")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(json.dumps(asdict(teacher.identity)), flush=True)
    parent = os.getpid()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            serve(teacher, Birth(**json.loads(line)), parent)
            os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    main()
