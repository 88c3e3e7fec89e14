"""Ranks of `megatron_mlr1.train` without torchrun: forked, so that they start in moments."""

import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE_S = 60.0
"""Between the end of one rank and a signal to the others, and before a harder signal."""


def forking_context() -> multiprocessing.context.ForkServerContext:
    """Give the context whose processes are forked by a server that has loaded the engine."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.engine_loaded"])
    return context


def free_port() -> int:
    """Give a port to meet at, soon.

    It is none of those that Linux gives to who asks for any: between this look and the meeting a
    socket of another test could get it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class Ranks:
    """The processes of one run on this machine; `poll` and `wait` are those of `Popen`.

    As with torchrun, the first one that fails ends the others, and the log tells its exit code.
    """

    def __init__(
        self, words: Sequence[str], log: Path, environment: Mapping[str, str], num_ranks: int
    ) -> None:
        """Start them; what they print goes to `log`."""
        self._log = log
        self._code: int | None = None
        port = free_port()
        log.write_bytes(b"")
        context = forking_context()
        self._ranks: list[BaseProcess] = []
        for rank in range(num_ranks):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
            own |= {"LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
            values = {**environment, "MASTER_ADDR": "127.0.0.1"}
            values |= {name: str(value) for name, value in own.items()}
            process = context.Process(target=_train, args=(list(words), str(log), values))
            process.start()
            self._ranks.append(process)

    @property
    def pids(self) -> list[int]:
        """The processes' numbers, by rank."""
        return [rank.pid for rank in self._ranks if rank.pid is not None]

    def poll(self) -> int | None:
        """Tell the exit code of the run, None as long as it goes on."""
        codes = [rank.exitcode for rank in self._ranks]
        if self._code is None and (any(codes) or None not in codes):
            self._end(GRACE_S)
        return self._code

    def wait(self, timeout: float) -> int:
        """Wait for the end and tell its exit code.

        Raises:
            TimeoutExpired: it did not end; it was killed.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self._end(0)
                raise subprocess.TimeoutExpired("megatron_mlr1.train", timeout)
            self._ranks[0].join(0.05)
        return code

    def _end(self, grace_s: float) -> None:
        for end in (lambda rank: None, BaseProcess.terminate, BaseProcess.kill):
            for rank in self._ranks:
                end(rank)
                rank.join(grace_s)
        codes = [rank.exitcode for rank in self._ranks]
        self._code = int(any(codes))
        if self._code:
            with self._log.open("a") as log:
                log.writelines(
                    f"[rank {rank}] exitcode : {code}\n" for rank, code in enumerate(codes)
                )


def _train(words: list[str], log: str, environment: dict[str, str]) -> None:
    """Be one rank: what `python -m megatron_mlr1.train` does with these words."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv[:] = ["train", *words]
    from megatron_mlr1.train import main

    sys.exit(main(words))
