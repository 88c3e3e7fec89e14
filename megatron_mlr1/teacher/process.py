"""One replica's process: `python -m megatron_mlr1.teacher.process PLACE`, started by a supervisor.

PLACE is the JSON of `serving.place_of`. The first line on standard output says that it serves. It
drains on SIGTERM and SIGINT, and when its standard input ends.
"""

import json
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
from megatron_mlr1.teacher.model import load_teacher
from megatron_mlr1.teacher.replica import Replica, ReplicaOptions


def main(words: list[str]) -> int:
    """Serve until drained; 2 where the teacher, the device or the address is at fault."""
    place = json.loads(words[0])
    transformers.utils.logging.disable_progress_bar()
    keep_large_blocks()
    try:
        replica = _open(place)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: replica.drain())
        threading.Thread(target=_drain_at_end_of_input, args=(replica,), daemon=True).start()
        print(f"replica {place['name']} serves at {replica.endpoint}", flush=True)
        replica.run()
    except Mlr1Error as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _open(place: dict[str, Any]) -> Replica:
    device = torch.device(place["device"])
    if device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
        raise MachineError(
            f"device {place['device']} is asked for; torch can use {torch.cuda.device_count()} "
            "GPUs here. Correct --devices."
        )
    keys = None if place["keys"] is None else read_pool_keys(Path(place["keys"]))
    teacher = load_teacher(Path(place["model"]), device, place["dtype"])
    options = ReplicaOptions(
        name=place["name"],
        bind=place["bind"],
        advertise=place["advertise"],
        data_bind=place["data_bind"],
        keys=keys,
        pool=None if place["pool"] is None else Path(place["pool"]),
        max_queue_tokens=place["max_queue_tokens"],
        held_bytes=place["held_bytes"],
        drain_s=place["drain_s"],
    )
    return Replica(teacher, options)


def _drain_at_end_of_input(replica: Replica) -> None:
    while sys.stdin.buffer.read(1):
        pass
    replica.drain()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
