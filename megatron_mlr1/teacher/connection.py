"""The connection to one replica: handshake, sealed messages, credit, and signs of life.

It knows sockets and messages, not tickets. All of it runs in the client's one thread; nothing here
waits. A connection that has died is closed and never used again: whoever wants the replica back
opens a new one, so no message of the old one can come late on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from megatron_mlr1.teacher import payloads, wire
from megatron_mlr1.teacher.keys import KeyPair
from megatron_mlr1.teacher.pool import needs_ipv6
from megatron_mlr1.teacher.spec import TeacherIdentity
from megatron_mlr1.teacher.wire import Buffer, Kind, Limits, Message, WireError

PING_S: Final = 0.5
SILENT_S: Final = 2.0
"""A replica that gives no sign for so long, though it was asked for one, is dead."""
RECEIVE_BATCH: Final = 16
"""Messages read from one replica before the next one has its turn."""

DEATHS: Final = {
    zmq.EVENT_DISCONNECTED: "the connection broke",
    zmq.EVENT_CLOSED: "nobody listens there",
    zmq.EVENT_CONNECT_RETRIED: "nobody listens there",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it does not know this student's key; its public key must lie "
    "in the replica's folder of students when the replica starts",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake broke off: the pool's public key here is "
    "not its own, or one side has no keys",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it does not speak as a replica with the pool's keys "
    "does: one side has no keys, or it is no replica",
}
"""Events of a connection that is of no use any more, and what they mean."""

_REFUSALS: Final = frozenset(
    {zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL}
    | {zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL}
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica is."""

    replica: str
    """Names one life of one replica; a replica that was started again has another name."""

    endpoint: str
    """For ZeroMQ: tcp://HOST:PORT or ipc://PATH."""

    public_key: bytes | None
    """The pool's CURVE key, 40 characters; None where the pool has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which teacher a student will learn from; "" or 0 where any will do."""

    fingerprint: str = ""
    tokenizer_sha256: str = ""
    vocab_size: int = 0


class Phase(Enum):
    """How far a connection is."""

    GREETING = auto()
    ATTACHING = auto()
    """The data port does not know this student yet."""
    SERVING = auto()
    DRAINING = auto()
    """It finishes what it has and takes no more."""
    DEAD = auto()


class Connection:
    """One replica, from the first greeting to its death."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: Address,
        keys: KeyPair | None,
        wanted: Wanted,
        student: str,
        now: float,
    ) -> None:
        """Open the socket and send the greeting.

        Args:
            context: of this process.
            address: of the replica.
            keys: the student's; None where the pool has no keys either.
            wanted: which teacher it must be.
            student: the student's name, for people.
            now: seconds, of the clock that all other calls use.
        """
        self.address = address
        self.phase = Phase.GREETING
        self.reason = ""
        """Why it died."""
        self.is_refused = False
        """Whether the two sides do not fit, so that trying again is of little use."""
        self.identity: TeacherIdentity | None = None
        self.max_tokens = 0
        self.max_head_rows = 0
        self._context, self._wanted, self._limits = context, wanted, Limits()
        self._session_key: bytes | None = None
        self._control = self._open(address.endpoint)
        if address.public_key is not None and keys is not None:
            self._control.curve_publickey = keys.public
            self._control.curve_secretkey = keys.secret
            self._control.curve_serverkey = address.public_key
        self._data: zmq.Socket[bytes] | None = None
        self._monitors = [self._control.get_monitor_socket()]
        self._granted = self._received = self._expected = 0
        self._unanswered_since: float | None = now
        """When the first message left since the last sign of the replica."""
        self._is_doubted = False
        self._ping_at = now + PING_S
        try:
            self._control.connect(address.endpoint)
        except zmq.ZMQError as error:
            self.die(f"{address.endpoint!r} is no address ({error})")
        hello: payloads.Fields = {
            "student": student,
            "fingerprint": wanted.fingerprint,
            "tokenizer_sha256": wanted.tokenizer_sha256,
            "vocab_size": wanted.vocab_size,
        }
        self._send(Message(kind=Kind.HELLO, frames=(payloads.text_frame(hello),)))

    @property
    def is_dead(self) -> bool:
        """Whether it is of no use any more."""
        return self.phase is Phase.DEAD

    def sockets(self) -> Iterator[zmq.Socket[bytes]]:
        """Give what must be watched for something to read."""
        if not self.is_dead:
            yield from self._monitors
            yield from self._own_sockets()

    def submit(self, number: int, key: bytes, frames: tuple[Buffer, ...], num_bytes: int) -> None:
        """Ask for targets of so many bytes."""
        self._expect(num_bytes)
        self._send(self._message(Kind.SUBMIT, number, key, frames))

    def ask_head(self, number: int, begin: int, end: int, num_bytes: int) -> None:
        """Ask for rows of the head."""
        self._expect(num_bytes)
        self._send(
            self._message(Kind.HEAD, number, frames=(payloads.head_range_frame(begin, end),))
        )

    def cancel(self, number: int, key: bytes) -> None:
        """Say that an answer is not wanted any more; it may come all the same."""
        self._send(self._message(Kind.CANCEL, number, key))

    def settle(self, num_bytes: int) -> None:
        """Expect an answer no more: it came, was refused, or was cancelled."""
        self._expected -= num_bytes

    def receive(self, now: float) -> Iterator[Message]:
        """Give the messages that are there and that concern requests; sees to all others."""
        self._look_at_monitors()
        budget = RECEIVE_BATCH
        for socket in (self._control, self._data):
            while socket is not None and budget and not self.is_dead:
                try:
                    parts = socket.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                budget -= 1
                message = self._decode([part.buffer for part in parts], socket is self._data)
                if message is not None:
                    self._unanswered_since, self._is_doubted = None, False
                    yield from self._sort(message)

    def tick(self, now: float) -> None:
        """Ask for a sign of life when it is time, and notice when none comes.

        This process may have slept itself. So silence is counted from what was asked, not from what
        was heard, and is believed when it is seen twice: signs that wait in the socket are read in
        between.
        """
        if self.is_dead:
            return
        since = self._unanswered_since
        is_silent = since is not None and now - since > SILENT_S - PING_S
        if is_silent and self._is_doubted:
            where = "; is the name right, and no firewall between?"
            self.die(f"no sign of it for {SILENT_S:.0f} s{'' if self.identity else where}")
            return
        self._is_doubted = is_silent
        if now >= self._ping_at and self.phase is not Phase.GREETING:
            self._ping_at = now + PING_S
            self._unanswered_since = now if since is None else since
            self._send(self._message(Kind.PING))

    def die(self, reason: str) -> None:
        """Close the connection."""
        if self.is_dead:
            return
        self.phase, self.reason = Phase.DEAD, reason
        for socket, monitor in zip(self._own_sockets(), self._monitors, strict=True):
            socket.disable_monitor()
            monitor.close(0)
            socket.close(0)

    def _own_sockets(self) -> list[zmq.Socket[bytes]]:
        return [socket for socket in (self._control, self._data) if socket is not None]

    def _open(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        # The breaker decides when to come back, with a new connection.
        socket.reconnect_ivl = -1
        socket.ipv6 = needs_ipv6(endpoint)
        socket.maxmsgsize = self._limits.max_payload_bytes
        # What a replica may send is bounded by the credit, in bytes.
        socket.rcvhwm = socket.sndhwm = 0
        return socket

    def _message(
        self, kind: Kind, number: int = 0, key: bytes = wire.NO_KEY, frames: tuple[Buffer, ...] = ()
    ) -> Message:
        teacher = wire.NO_TEACHER if self.identity is None else self.identity.short
        return Message(
            kind=kind,
            request=number,
            key=key,
            teacher=teacher,
            value=self._granted,
            frames=frames,
        )

    def _send(self, message: Message) -> None:
        if self.is_dead:
            return
        try:
            self._control.send_multipart(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.die("the connection broke")

    def _expect(self, num_bytes: int) -> None:
        self._expected += num_bytes
        self._granted = max(self._granted, self._received + self._expected)

    def _arrived(self, num_bytes: int) -> None:
        """Count received bytes; tell the replica at once where an unwanted answer used credit."""
        self._received += num_bytes
        must_grant = self._received + self._expected
        if must_grant > self._granted:
            self._granted = must_grant
            self._send(self._message(Kind.PING))

    def _look_at_monitors(self) -> None:
        for monitor in self._monitors:
            while not self.is_dead and monitor.poll(0):
                event = zmq.Event(recv_monitor_message(monitor)["event"])
                if event in DEATHS:
                    self.is_refused = event in _REFUSALS
                    self.die(DEATHS[event])

    def _decode(self, parts: list[memoryview], from_data_port: bool) -> Message | None:
        session_key = self._session_key if from_data_port else None
        try:
            return wire.decode(parts, self._limits, session_key)
        except WireError as error:
            # Over an open port anyone on the way may have made it; the replica is not to blame.
            if not from_data_port:
                self.die(f"it sent what is no message: {error}")
            return None

    def _sort(self, message: Message) -> Iterator[Message]:
        """See to the handshake and to signs of life; give the rest."""
        kind = message.kind
        if self.phase is Phase.GREETING:
            self._greeted(message)
        elif kind is Kind.ATTACH:
            self.phase = Phase.SERVING if self.phase is Phase.ATTACHING else self.phase
        elif kind is Kind.GOAWAY:
            self.phase = Phase.DRAINING
            if message.request:
                yield message
        elif kind is Kind.ERROR and message.request == 0:
            self.die(f"it refused: {_error_text(message)}")
        elif kind is not Kind.PONG:
            yield message
        if kind in (Kind.DATA, Kind.HEAD):
            self._arrived(message.num_bytes)

    def _greeted(self, message: Message) -> None:
        """Check who answers, and go to its data port where it has one."""
        if message.kind is Kind.GOAWAY:
            self.die("it is leaving the pool")
            return
        self.is_refused = True
        if message.kind is not Kind.HELLO_ACK:
            self.die(f"it refused: {_error_text(message)}")
            return
        try:
            fields = payloads.read_fields(message, payloads.HELLO_ACK_FIELDS)
            identity = payloads.read_identity(fields)
            session = bytes.fromhex(fields["session"])
            session_key = bytes.fromhex(fields["session_key"])
        except (WireError, ValueError) as error:
            self.die(f"its greeting is none: {error}")
            return
        other = difference(identity, self._wanted)
        if other:
            self.die(f"it serves another teacher: {other}")
            return
        self.is_refused = False
        self.identity = identity
        self.max_tokens, self.max_head_rows = fields["max_tokens"], fields["max_head_rows"]
        if fields["data_endpoint"]:
            self._attach(fields["data_endpoint"], session, session_key)
        else:
            self.phase = Phase.SERVING

    def _attach(self, endpoint: str, session: bytes, session_key: bytes) -> None:
        self.phase, self._session_key = Phase.ATTACHING, session_key
        try:
            data = self._open(endpoint)
            monitor = data.get_monitor_socket()
            data.connect(endpoint)
        except zmq.ZMQError as error:
            self.die(f"its data port {endpoint!r} is of no use ({error})")
            return
        self._data = data
        self._monitors.append(monitor)
        attach = Message(kind=Kind.ATTACH, frames=(session,))
        self._data.send_multipart(wire.encode(attach, session_key), zmq.NOBLOCK)


def difference(identity: TeacherIdentity, wanted: Wanted) -> str:
    """Say in what a teacher is not the one that is wanted."""
    for name in Wanted.__slots__:
        found: Any = getattr(identity, name)
        must_be = getattr(wanted, name)
        if must_be and found != must_be:
            return f"its {name} is {found}, it must be {must_be}"
    return ""


def _error_text(message: Message) -> str:
    if message.kind is not Kind.ERROR:
        return f"it answered with {message.kind.name}"
    try:
        code, text = wire.read_error(message)
    except WireError as error:
        return str(error)
    return f"{code.name}, {text}"
