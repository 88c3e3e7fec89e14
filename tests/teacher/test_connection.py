import time

import pytest
import zmq

from megatron_mlr1.teacher.connection import SILENT_S, Address, Connection, Phase, Wanted
from megatron_mlr1.teacher.pool import FolderPool
from tests.support.teacher_pool import pool_of, shared_nursery
from tests.support.teachers import PATIENCE_S


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("connection") / "pool"
    with pool_of(shared_nursery(), folder, 1):
        yield FolderPool(folder).leases()[0].endpoint


@pytest.fixture
def connection(endpoint):
    context = zmq.Context()
    connection = Connection(context, Address("r0", endpoint, None), None, Wanted(), "me", 0.0)
    yield connection
    connection.die("the test is over")
    context.term()


def listen(connection, now, until):
    """Read what comes until something holds; `now` is what the connection takes for the time."""
    end = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < end, "it did not come true in time"
        poller = zmq.Poller()
        for socket in connection.sockets():
            poller.register(socket, zmq.POLLIN)
        poller.poll(10)
        assert list(connection.receive(now)) == []


def hear_a_sign(connection, now):
    """Wait for a message and read it."""
    *_, control = connection.sockets()
    assert control.poll(PATIENCE_S * 1000), "the replica gave no sign"
    assert list(connection.receive(now)) == []


def test_a_replica_says_who_it_is(connection):
    listen(connection, 0.1, lambda: connection.phase is Phase.SERVING)
    assert connection.identity == shared_nursery().identity
    assert connection.max_tokens == 512
    assert connection.max_head_rows == 256


def test_a_student_that_slept_does_not_take_the_replica_for_dead(connection):
    listen(connection, 0.1, lambda: connection.phase is Phase.SERVING)
    for hour in range(1, 4):
        now = 3600.0 * hour
        connection.tick(now)  # asks for a sign
        connection.tick(now + SILENT_S)  # slept again; the answer is in the socket
        assert not connection.is_dead
        hear_a_sign(connection, now + SILENT_S)
        connection.tick(now + SILENT_S + 0.01)
        assert not connection.is_dead


def test_a_replica_that_gives_no_sign_is_dead_two_seconds_after_its_last_one(connection):
    listen(connection, 0.0, lambda: connection.phase is Phase.SERVING)
    connection.tick(0.5)
    connection.tick(1.9)
    assert not connection.is_dead
    connection.tick(2.01)
    connection.tick(2.02)
    assert connection.is_dead
    assert "no sign" in connection.reason
    assert list(connection.sockets()) == []


def test_whoever_does_not_greet_is_dead(endpoint):
    context = zmq.Context()
    deaf = context.socket(zmq.ROUTER)
    port = deaf.bind_to_random_port("tcp://127.0.0.1")
    address = Address("deaf", f"tcp://127.0.0.1:{port}", None)
    connection = Connection(context, address, None, Wanted(), "me", 0.0)
    connection.tick(2.0)
    connection.tick(2.1)
    assert connection.is_dead
    deaf.close(0)
    context.term()


@pytest.mark.parametrize("answer", [[b""], [b"MLRT" + bytes(60)], [bytes(64), b"x" * 100]])
def test_whoever_answers_with_noise_is_dead(answer):
    context = zmq.Context()
    babbler = context.socket(zmq.ROUTER)
    port = babbler.bind_to_random_port("tcp://127.0.0.1")
    address = Address("babbler", f"tcp://127.0.0.1:{port}", None)
    connection = Connection(context, address, None, Wanted(), "me", 0.0)
    route, *_ = babbler.recv_multipart()
    babbler.send_multipart([route, *answer])
    listen(connection, 0.1, lambda: connection.is_dead)
    assert "no message" in connection.reason
    babbler.close(0)
    context.term()
