"""One replica's process: `python -m megatron_mlr1.teacher.process PLACE`, started by a supervisor.

PLACE is the JSON of `serving.place_of`. The first line on standard output says that it serves. It
drains on SIGTERM and SIGINT, and when its standard input ends.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_mlr1.errors import MachineError, Mlr1Error
from megatron_mlr1.teacher.keys import read_pool_keys
from megatron_mlr1.teacher.memory import keep_large_blocks
from megatron_mlr1.teacher.model import TeacherModel, load_teacher
from megatron_mlr1.teacher.open_files import allow_many
from megatron_mlr1.teacher.replica import Replica, ReplicaOptions
from megatron_mlr1.teacher.serving import read_gate


def main(words: list[str]) -> int:
    """Serve until drained; 2 where the teacher, the device or the address is at fault."""
    place = json.loads(words[0])
    transformers.utils.logging.disable_progress_bar()
    keep_large_blocks()
    allow_many()
    try:
        teacher, note = _load(place)
        replica = _open(place, teacher)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: replica.drain())
        threading.Thread(target=_drain_at_end_of_input, args=(replica,), daemon=True).start()
        _say(f"replica {place['name']} serves at {replica.endpoint}{note}")
        replica.run()
    except Mlr1Error as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _load(place: dict[str, Any]) -> tuple[TeacherModel, str]:
    """Load the teacher, and say what there is to say of it."""
    folder, device = Path(place["model"]), torch.device(place["device"])
    if device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
        raise MachineError(
            f"device {place['device']} is asked for; torch can use {torch.cuda.device_count()} "
            "GPUs here. Correct --devices."
        )
    if place["fp8"] is None:
        return load_teacher(folder, device, place["dtype"]), ""
    from megatron_mlr1.teacher.fp8 import load_fp8_teacher

    teacher, drift = load_fp8_teacher(folder, device, read_gate(place["fp8"]))
    return teacher, f"; {drift}"


def _open(place: dict[str, Any], teacher: TeacherModel) -> Replica:
    keys = None if place["keys"] is None else read_pool_keys(Path(place["keys"]))
    pool = None if place["pool"] is None else Path(place["pool"])
    options = ReplicaOptions(
        name=place["name"],
        bind=place["bind"],
        advertise=place["advertise"],
        data_bind=place["data_bind"],
        keys=keys,
        pool=pool,
        max_queue_tokens=place["max_queue_tokens"],
        held_bytes=place["held_bytes"],
        drain_s=place["drain_s"],
    )
    return Replica(teacher, options)


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        # The supervisor died while the teacher was loading; the input has ended too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _drain_at_end_of_input(replica: Replica) -> None:
    # Not `sys.stdin`: its lock, held by a thread that waits, would abort the interpreter's end.
    while os.read(sys.stdin.fileno(), 1):
        pass
    replica.drain()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
