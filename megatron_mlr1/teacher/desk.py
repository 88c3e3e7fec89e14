"""What a replica answers to its students: sessions, queue and results, without sockets."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Final, Protocol

from megatron_mlr1.teacher import payloads
from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.engine import Engine, RequestError
from megatron_mlr1.teacher.sessions import MAX_WAITING, SILENCE_S, Session
from megatron_mlr1.teacher.spec import Targets, bytes_per_token
from megatron_mlr1.teacher.statistics import Counters
from megatron_mlr1.teacher.wire import (
    Code,
    Kind,
    Limits,
    Message,
    WireError,
    decode,
    error_message,
)
from megatron_mlr1.teacher.work import Job, ResultRing, Waiter, WorkQueue

HEAD_REPLY_BYTES: Final = 2**25
"""Rows of the head in one reply have at most so many bytes."""
LONGEST_WAIT_MS: Final = 5000
SHORTEST_WAIT_MS: Final = 20


class Outlet(Protocol):
    """Where answers go; `ports.Ports` is one."""

    def send(self, route: bytes, message: Message, session_key: bytes | None) -> bool:
        """Send to a student; False where it must wait; ConnectionError where it is gone."""

    def send_data(self, route: bytes, message: Message, session_key: bytes | None) -> bool:
        """The same over the open data port, sealed."""


class Desk:
    """Takes the students' messages and gives them their answers; for one thread."""

    def __init__(
        self, name: str, engine: Engine, outlet: Outlet, queue: WorkQueue, held_bytes: int
    ) -> None:
        """Open without students.

        Args:
            name: the replica's.
            engine: the teacher; it is not asked to compute here.
            outlet: where answers go.
            queue: what is to be computed.
            held_bytes: of replies that are promised and not sent, and as much again of kept
                results.
        """
        self._name, self._engine, self._outlet, self._queue = name, engine, outlet, queue
        self.limits = Limits(max_tokens=engine.max_tokens, max_payload_bytes=2**20)
        self._held_bytes = held_bytes
        self._ring = ResultRing(held_bytes)
        self._counters = Counters()
        self._sessions: dict[bytes, Session] = {}
        self._by_token: dict[bytes, Session] = {}
        self._is_draining = False
        self._answers: dict[Kind, Callable[[Session, Message], None]] = {
            Kind.SUBMIT: self._submit,
            Kind.CANCEL: self._cancel,
            Kind.PING: self._ping,
            Kind.HEAD: self._head,
            Kind.STATS: self._stats,
        }
        self.data_endpoint = ""
        """Told to students; "" without an open data port."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is owed to anyone."""
        return not len(self._queue) and all(s.is_idle for s in self._sessions.values())

    @property
    def has_students(self) -> bool:
        """Whether anyone would be told that the replica leaves."""
        return bool(self._sessions)

    def begin_drain(self) -> None:
        """Tell every student to go elsewhere; what is accepted is still answered."""
        self._is_draining = True
        for session in self._sessions.values():
            self._post(session, Message(kind=Kind.GOAWAY))

    def on_message(self, route: bytes, parts: Sequence[Any]) -> None:
        """Answer a message from the port for all messages."""
        try:
            message = decode(parts, self.limits)
            if message.kind is Kind.HELLO:
                self._hello(route, message)
                return
            session = self._sessions.get(route)
            if session is None:
                self._send(route, error_message(Code.NO_HELLO, "say HELLO first.", message))
                return
            answer = self._answers.get(message.kind)
            if answer is None or message.teacher != self._engine.identity.short:
                raise WireError(
                    f"{message.kind.name} is not for a replica, or names another teacher than the "
                    "HELLO_ACK did."
                )
            session.heard = time.monotonic()
            session.credit = max(session.credit, message.value)
            answer(session, message)
        except WireError as error:
            self._counters.refused += 1
            self._send(route, error_message(Code.MALFORMED, str(error)))

    def on_data_port(self, route: bytes, parts: Sequence[Any]) -> None:
        """Let a student attach; whoever does not prove to be one hears nothing."""
        session = self._by_token.get(bytes(parts[1])) if len(parts) == 2 else None
        if session is not None:
            try:
                message = decode(parts, self.limits, session.key)
            except WireError:
                session = None
            else:
                session = session if message.kind is Kind.ATTACH else None
        if session is None:
            self._counters.refused += 1
            return
        session.data_route = route
        attached = Message(kind=Kind.ATTACH, teacher=self._engine.identity.short)
        try:
            self._outlet.send_data(route, attached, session.key)
        except ConnectionError:
            session.data_route = None

    def deliver(self, job: Job, result: Targets | RequestError, seconds: float) -> None:
        """Answer all who wait for a computation that took so many seconds."""
        waiters = self._queue.finish(job)
        if isinstance(result, Targets):
            self._counters.computed(job.request.rows, seconds)
            self._ring.put(job.key, result)
        else:
            self._counters.failed += 1
        for waiter in waiters:
            session = self._sessions.get(waiter.student)
            if session is not None:
                self._answer(session, waiter, job.key, result)

    def settle(self) -> None:
        """Send what may be sent, and forget students that left or fell silent."""
        now = time.monotonic()
        for session in list(self._sessions.values()):
            if session.heard + SILENCE_S < now or session.num_waiting > MAX_WAITING:
                self._forget(session)
                continue
            try:
                sent = session.flush(self._outlet.send, self._outlet.send_data)
            except ConnectionError:
                self._forget(session)
            else:
                self._counters.bytes_sent += sent

    def _answer(
        self, session: Session, waiter: Waiter, key: bytes, result: Targets | RequestError
    ) -> None:
        asked = Message(kind=Kind.SUBMIT, request=waiter.request, key=key)
        session.pending.pop(waiter.request, None)
        if isinstance(result, RequestError):
            session.promised -= waiter.num_bytes
            self._post(session, error_message(result.code, str(result), asked))
            return
        seconds = time.monotonic() - waiter.arrived
        self._counters.answered(seconds)
        frames = payloads.data_frames(result)
        self._post(session, replace(asked, kind=Kind.DATA, value=int(seconds * 1e6), frames=frames))

    def _hello(self, route: bytes, message: Message) -> None:
        fields = payloads.read_fields(message, payloads.HELLO_FIELDS)
        identity = self._engine.identity
        for name in ("fingerprint", "tokenizer_sha256", "vocab_size"):
            mine, wanted = getattr(identity, name), fields[name]
            if wanted and wanted != mine:
                self._counters.refused += 1
                text = (
                    f"{name} of this teacher ({identity.name}) is {mine}; the student wants "
                    f"{wanted}. Serve the right teacher, or start the student with its tokenizer."
                )
                self._send(route, error_message(Code.WRONG_TEACHER, text, message))
                return
        if self._is_draining:
            self._send(route, Message(kind=Kind.GOAWAY, teacher=identity.short))
            return
        if route in self._sessions:
            self._forget(self._sessions[route])
        session = Session(route, fields["student"][:256], credit=message.value)
        self._sessions[route] = self._by_token[session.token] = session
        ack = asdict(identity) | {
            "max_tokens": self._engine.max_tokens,
            "max_head_rows": self._max_head_rows,
            "data_endpoint": self.data_endpoint,
            "session": session.token.hex(),
            "session_key": session.key.hex() if self.data_endpoint else "",
        }
        frames = (payloads.text_frame(ack),)
        self._post(session, self._reply(message, Kind.HELLO_ACK, frames))

    def _submit(self, session: Session, message: Message) -> None:
        if message.request in session.pending:
            return  # sent twice; one answer is on its way
        submission = payloads.read_submit(message, self.limits)
        request = submission.request
        identity = self._engine.identity
        key = content_key(identity, request)
        if key != message.key:
            raise WireError("a SUBMIT's key is not that of its tokens, bounds and spec.")
        if self._is_draining:
            self._post(session, self._reply(message, Kind.GOAWAY))
            return
        try:
            self._engine.refuse(request)
        except RequestError as error:
            self._counters.refused += 1
            self._post(session, error_message(error.code, str(error), message))
            return
        num_bytes = request.rows * bytes_per_token(request.spec, identity)
        if not self._has_room(session, key, request.rows, num_bytes):
            self._counters.busy += 1
            busy = self._reply(message, Kind.BUSY)
            self._post(session, replace(busy, value=self._wait_ms()))
            return
        now = time.monotonic()
        waiter = Waiter(session.route, message.request, now, num_bytes)
        session.pending[message.request] = key
        session.promised += num_bytes
        kept = self._ring.get(key)
        if kept is not None:
            self._counters.from_ring += 1
            self._answer(session, waiter, key, kept)
            return
        deadline = now + submission.deadline_ms / 1000
        self._counters.joined += self._queue.add(key, request, deadline, waiter)
        self._post(session, self._reply(message, Kind.ACCEPT))

    def _has_room(self, session: Session, key: bytes, rows: int, num_bytes: int) -> bool:
        promised = sum(other.promised for other in self._sessions.values())
        holds = promised == 0 or promised + num_bytes <= self._held_bytes
        return holds and session.num_waiting < MAX_WAITING and self._queue.has_room(key, rows)

    def _wait_ms(self) -> int:
        """Half the time that the queue takes: by then there is room again."""
        speed = self._counters.speed()
        if speed is None:
            return SHORTEST_WAIT_MS * 5
        wait_ms = int(self._queue.tokens / speed * 500)
        return min(max(wait_ms, SHORTEST_WAIT_MS), LONGEST_WAIT_MS)

    def _cancel(self, session: Session, message: Message) -> None:
        key = session.pending.pop(message.request, None)
        if key is not None:
            waiter = self._queue.cancel(key, session.route, message.request)
            session.promised -= 0 if waiter is None else waiter.num_bytes
            self._counters.cancelled += 1

    def _ping(self, session: Session, message: Message) -> None:
        self._post(session, self._reply(message, Kind.PONG))

    def _head(self, session: Session, message: Message) -> None:
        begin, end = payloads.read_head_range(message, self._engine.identity.vocab_size)
        if end - begin > self._max_head_rows:
            raise WireError(
                f"{end - begin} rows of the head are asked for; {self._max_head_rows} fit a reply."
            )
        rows = self._engine.head_rows(begin, end)
        session.promised += 8 + rows.nbytes
        frames = (payloads.head_range_frame(begin, end), rows.data)
        self._post(session, self._reply(message, Kind.HEAD, frames))

    def _stats(self, session: Session, message: Message) -> None:
        counters = self._counters
        fields: dict[str, str | int | float | None] = {
            "replica": self._name,
            "name": self._engine.identity.name,
            "state": "draining" if self._is_draining else "serving",
            "uptime_s": time.monotonic() - counters.started,
            "students": len(self._sessions),
            "queue_requests": len(self._queue),
            "queue_tokens": self._queue.tokens,
            "tokens_per_s": float(counters.tokens_per_s()),
            "p50_ms": counters.latency_ms(50),
            "p99_ms": counters.latency_ms(99),
        }
        fields |= {
            name: getattr(counters, name) for name in payloads.STATS_FIELDS.keys() - fields.keys()
        }
        self._post(session, self._reply(message, Kind.STATS, (payloads.text_frame(fields),)))

    @property
    def _max_head_rows(self) -> int:
        identity = self._engine.identity
        row_bytes = identity.hidden_size * identity.state_dtype.itemsize
        return max(1, min(identity.vocab_size, HEAD_REPLY_BYTES // row_bytes))

    def _reply(self, message: Message, kind: Kind, frames: tuple[Any, ...] = ()) -> Message:
        value = self._queue.tokens if kind in (Kind.HELLO_ACK, Kind.ACCEPT, Kind.PONG) else 0
        return Message(
            kind=kind, request=message.request, key=message.key, value=value, frames=frames
        )

    def _post(self, session: Session, message: Message) -> None:
        session.post(replace(message, teacher=self._engine.identity.short))

    def _send(self, route: bytes, message: Message) -> None:
        """Send to somebody without a session, or not at all."""
        with suppress(ConnectionError):
            self._outlet.send(route, message, None)

    def _forget(self, session: Session) -> None:
        for number, key in session.pending.items():
            self._queue.cancel(key, session.route, number)
        self._sessions.pop(session.route, None)
        self._by_token.pop(session.token, None)
