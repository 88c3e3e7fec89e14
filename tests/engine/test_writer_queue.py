"""The checkpoint writers' queue survives a SIGTERM to its session and ends with its parent."""

import os
import signal
import subprocess
import sys
import time

import psutil

PARENT = """
import os, signal, sys, time
from multiprocessing import active_children
from megatron_mlr1.engine.writer_queue import results_queue
if __name__ == "__main__":
    queue = results_queue(mp_mode="fork")  # as the engine asks where it saves on the side
    signal.signal(signal.SIGTERM, lambda *_: None)
    print(*(child.pid for child in active_children()), flush=True)
    time.sleep(3)
    queue.put("saved")
    print(results_queue().get(), flush=True)
    time.sleep(60)
"""


def ends(pid: int) -> bool:
    for _ in range(600):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_it_outlives_sigterm_and_not_its_parent(tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    try:
        server = int(parent.stdout.readline())
        os.killpg(parent.pid, signal.SIGTERM)
        assert parent.stdout.readline() == "saved\n"
        parent.kill()
        parent.wait()
        assert ends(server), "the queue's process stayed behind"
    finally:
        parent.kill()
        parent.stdout.close()
