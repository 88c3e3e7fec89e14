"""What a replica knows of one student: what it may send, what it owes, what waits to be sent."""

import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from megatron_mlr1.teacher.wire import Kind, Message

SILENCE_S: Final = 30.0
"""A student that says nothing for so long is forgotten; it sends a PING every half second."""
MAX_WAITING: Final = 4096
"""Requests, and unsent answers, of one student."""

type Send = Callable[[bytes, Message, bytes | None], bool]
"""Sends a message to a route, sealed by the key if there is one; False where it must wait."""


@dataclass(eq=False, slots=True)
class Session:
    """One student's connection."""

    route: bytes
    """Where ZeroMQ finds it."""
    name: str
    data_route: bytes | None = None
    """Where ZeroMQ finds it on the open data port, once it has attached."""
    token: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    """Seals what goes over the data port."""
    credit: int = 0
    """Bytes of DATA and HEAD that the student has had room for since its HELLO."""
    sent: int = 0
    """Bytes of DATA and HEAD sent since its HELLO."""
    promised: int = 0
    """Bytes of accepted requests that are not sent yet."""
    pending: dict[int, bytes] = field(default_factory=dict)
    """Content keys of accepted requests by their numbers."""
    heard: float = field(default_factory=time.monotonic)
    _control: deque[Message] = field(default_factory=deque)
    _data: deque[Message] = field(default_factory=deque)

    def post(self, message: Message) -> None:
        """Put an answer into line; what holds targets or head rows waits for credit."""
        is_data = message.kind in (Kind.DATA, Kind.HEAD)
        (self._data if is_data else self._control).append(message)

    @property
    def num_waiting(self) -> int:
        """Answers that wait to be sent, and requests that wait to be answered."""
        return len(self.pending) + len(self._control) + len(self._data)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is owed."""
        return self.num_waiting == 0

    def flush(self, send: Send, send_data: Send) -> int:
        """Send what may be sent and give the bytes of DATA and HEAD among it.

        Args:
            send: to `route`.
            send_data: to `data_route`.
        """
        while self._control and send(self.route, self._control[0], None):
            self._control.popleft()
        before = self.sent
        while self._data and self.sent + self._data[0].num_bytes <= self.credit:
            message = self._data[0]
            if self.data_route is None:
                is_sent = send(self.route, message, None)
            else:
                is_sent = send_data(self.data_route, message, self.key)
            if not is_sent:
                break
            self._data.popleft()
            self.sent += message.num_bytes
            self.promised -= message.num_bytes
        return self.sent - before
