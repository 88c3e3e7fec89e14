"""The look at addresses before a teacher is loaded; sockets at work are in test_replica.py."""

import socket

import pytest
import zmq

from megatron_mlr1.errors import MachineError
from megatron_mlr1.teacher.ports import refuse_taken


def test_an_address_that_is_taken_or_none_of_this_machine_is_told_before_a_teacher_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(
            MachineError, match=rf"{taken} cannot be bound \(Address already in use"
        ):
            refuse_taken(["tcp://127.0.0.1:*", taken])
    for nowhere in ("tcp://no-interface-0:5600", "tcp://192.0.2.1:5600"):
        with pytest.raises(MachineError, match=f"{nowhere} cannot be bound"):
            refuse_taken([nowhere])


def test_looking_takes_nothing(tmp_path):
    # An address that no other test binds, as one of them could be given the port that was free.
    with socket.create_server(("127.0.0.77", 0)) as other:
        free = f"tcp://127.0.0.77:{other.getsockname()[1]}"
    place = f"ipc://{tmp_path}/socket"
    context = zmq.Context()
    served = context.socket(zmq.REP)
    served.bind(place)
    for _ in range(3):
        refuse_taken([free, place])
    asking = context.socket(zmq.REQ)
    asking.connect(place)
    asking.send(b"?")
    assert served.poll(60_000), "the socket of another program was left alone"
    context.destroy(0)
