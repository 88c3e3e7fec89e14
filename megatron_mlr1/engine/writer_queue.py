"""The queue of the engine's checkpoint writers, in a process that outlives a SIGTERM.

Only the standard library is imported here: the queue's process imports this module as it starts.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from queue import Queue
from typing import Any


def results_queue(mp_mode: str = "spawn") -> "Queue[Any]":
    """Give this process's one queue for the results of checkpoint writers.

    Args:
        mp_mode: how the engine would start its queue's process; not heeded, since one that is
            forked has threads' locks in it that nobody will open.

    `torchrun` sends SIGTERM to all processes of a session, the queue's among them. Training must
    still save then, so the queue's process does not heed the signal; it ends with its parent.
    """
    return _queue()


@cache
def _queue() -> "Queue[Any]":
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=_end_with_parent_alone)
    return manager.Queue()


def _end_with_parent_alone(end: Callable[[int], Any] = os._exit) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a process that multiprocessing started"

    def watch() -> None:
        wait([parent.sentinel])
        end(0)

    threading.Thread(target=watch, daemon=True).start()
