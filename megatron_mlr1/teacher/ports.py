"""A replica's sockets: an encrypted or local one for all messages, and an open one for targets."""

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import zmq
from zmq.auth.thread import ThreadAuthenticator

from megatron_mlr1.errors import MachineError
from megatron_mlr1.teacher.keys import PoolKeys
from megatron_mlr1.teacher.wire import (
    HEADER,
    MAX_FRAMES,
    Limits,
    Message,
    encode,
    largest_request_frame,
)

type OnMessage = Callable[[bytes, list[Any]], None]

UNSENT_MESSAGES: Final = 64
"""ZeroMQ keeps at most so many messages for one student; more wait with us."""
IO_THREADS: Final = 4
"""Students are spread over so many threads, which send, and encrypt, at the same time."""
HEARTBEAT_MS: Final = 2000
DEAD_MS: Final = 20_000
"""A connection that is silent for so long is closed; long enough for a large reply to pass."""
LINGER_MS: Final = 10_000
BURST: Final = 256
"""Messages taken in before answers go out again."""
_HOPELESS: Final = frozenset({zmq.EHOSTUNREACH, zmq.ECONNRESET})


class Ports:
    """The sockets of one replica; all but `wake` is for one thread."""

    def __init__(
        self, bind: str, data_bind: str | None, keys: PoolKeys | None, limits: Limits
    ) -> None:
        """Bind.

        Args:
            bind: address of the port for all messages.
            data_bind: address of the open port for targets, or None.
            keys: with them the first port speaks CURVE, with the students of the folder alone.
            limits: of a message.

        Raises:
            MachineError: an address cannot be bound.
        """
        self._limits = limits
        self._context = zmq.Context(IO_THREADS)
        self._authenticator: ThreadAuthenticator | None = None
        # A pair of ordinary sockets: it may be written by any thread and by a signal's handler.
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._closed = threading.Event()
        try:
            self._main = self._bind(bind, keys, largest_request_frame(limits))
            self._data = None if data_bind is None else self._bind(data_bind, None, HEADER.size)
        except (zmq.ZMQError, OSError) as error:
            self.close()
            raise _cannot_bind(
                bind if data_bind is None else f"{bind} or {data_bind}", error
            ) from error
        self._poller = zmq.Poller()
        for readable in (self._woken, self._main, self._data):
            if readable is not None:
                self._poller.register(readable, zmq.POLLIN)

    def _bind(self, address: str, keys: PoolKeys | None, largest: int) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.MAXMSGSIZE, largest)
        router.set(zmq.SNDHWM, UNSENT_MESSAGES)
        router.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        router.set(zmq.HEARTBEAT_TIMEOUT, DEAD_MS)
        router.set(zmq.TCP_KEEPALIVE, 1)
        router.set(zmq.IPV6, 1 if "[" in address else 0)
        router.set(zmq.LINGER, LINGER_MS)
        if keys is not None:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve(domain="*", location=os.fspath(keys.students))
            router.curve_server = True
            router.curve_publickey = keys.pair.public
            router.curve_secretkey = keys.pair.secret
        router.bind(address)
        return router

    def endpoint(self, host: str | None) -> str:
        """Give the address of the port for all messages, with another host if one is given."""
        return _address(self._main, host)

    def data_endpoint(self, host: str | None) -> str:
        """Give the address of the open port, "" without one."""
        return "" if self._data is None else _address(self._data, host)

    def wake(self) -> None:
        """Let `receive` return soon; from any thread, or from a signal's handler."""
        # Full means that it was woken already; closed, that nobody waits any more.
        with suppress(BlockingIOError, OSError):
            self._waker.send(b"!")

    def receive(self, timeout_ms: int, on_main: OnMessage, on_data: OnMessage) -> None:
        """Wait for messages and hand over those that are there, by their port.

        Args:
            timeout_ms: the longest wait.
            on_main: takes route and frames of a message; frames are `zmq.Frame`s' memory.
            on_data: the same for the open port.
        """
        ready = dict(self._poller.poll(timeout_ms))
        if self._woken.fileno() in ready:
            with suppress(BlockingIOError):
                self._woken.recv(4096)
        for router, take in ((self._main, on_main), (self._data, on_data)):
            if router is not None and router in ready:
                for _ in range(BURST):
                    parts = _receive(router)
                    if parts is None:
                        break
                    take(bytes(parts[0]), parts[1:])

    def send(self, route: bytes, message: Message, session_key: bytes | None) -> bool:
        """Send over the port for all messages; False where it must wait.

        Raises:
            ConnectionError: nobody is at that route any more.
        """
        return _send(self._main, route, message, session_key)

    def send_data(self, route: bytes, message: Message, session_key: bytes | None) -> bool:
        """Send over the open port, sealed with the key; False where it must wait.

        Raises:
            ConnectionError: nobody is at that route any more.
        """
        assert self._data is not None, "a student attached to a port that is not there"
        return _send(self._data, route, message, session_key)

    def close(self) -> None:
        """Close everything, after sending what was handed to ZeroMQ, for `LINGER_MS` at most."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy()
        self._woken.close()
        self._waker.close()


def refuse_taken(addresses: Sequence[str]) -> None:
    """See whether addresses can be bound, before a teacher is loaded that would serve there.

    Those of ipc are left out: to bind one takes it away from whoever has it.

    Raises:
        MachineError: another program has the port, or this machine has no such interface.
    """
    context = zmq.Context()
    try:
        for address in addresses:
            if address.startswith("tcp://"):
                router = context.socket(zmq.ROUTER)
                router.set(zmq.IPV6, 1 if "[" in address else 0)
                router.bind(address)
    except zmq.ZMQError as error:
        raise _cannot_bind(address, error) from error
    finally:
        context.destroy(0)


def _cannot_bind(what: str, error: Exception) -> MachineError:
    return MachineError(
        f"{what} cannot be bound ({error}). Name an interface or address of this machine and a "
        "free port; another pool, or a replica that still drains, may have this one."
    )


def _address(router: zmq.Socket[bytes], host: str | None) -> str:
    endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
    if host is None or not endpoint.startswith("tcp://"):
        return endpoint
    return f"tcp://{host}:{endpoint.rsplit(':', 1)[1]}"


def _receive(router: zmq.Socket[bytes]) -> list[Any] | None:
    """Take one message, of `MAX_FRAMES` + 2 frames at most; None where none waits."""
    try:
        frame = router.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    parts = [frame.buffer]
    while frame.more:
        frame = router.recv(copy=False)
        # One more than is right, so that the reader sees that there were too many.
        if len(parts) < MAX_FRAMES + 3:
            parts.append(frame.buffer)
    return parts


def _send(
    router: zmq.Socket[bytes], route: bytes, message: Message, session_key: bytes | None
) -> bool:
    parts = [route, *encode(message, session_key)]
    try:
        router.send_multipart(parts, zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno in _HOPELESS:
            raise ConnectionError(str(error)) from error
        raise
    return True
