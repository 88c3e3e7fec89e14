"""What the replicas of a pool say of themselves, as a table."""

import time
from dataclasses import dataclass
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from megatron_mlr1.teacher import payloads
from megatron_mlr1.teacher.connection import DEATHS
from megatron_mlr1.teacher.keys import StudentKeys
from megatron_mlr1.teacher.pool import Lease, Pool, needs_ipv6
from megatron_mlr1.teacher.wire import Kind, Limits, Message, WireError, decode, encode, read_error

ANSWER_S: Final = 3.0
"""A replica that has not answered by then is shown as silent."""


@dataclass(frozen=True, slots=True)
class Report:
    """One replica's answer."""

    lease: Lease
    fields: dict[str, Any] | None
    """`payloads.STATS_FIELDS`; None where there is none."""
    problem: str = ""


class _Asked:
    """One replica that is being asked."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], lease: Lease, keys: StudentKeys | None
    ) -> None:
        """Connect and greet."""
        self._lease = lease
        self.report: Report | None = None
        self._problem = "silent"
        self.dealer = context.socket(zmq.DEALER)
        self.dealer.linger = 0
        self.dealer.maxmsgsize = Limits().max_payload_bytes
        self.dealer.ipv6 = needs_ipv6(lease.endpoint)
        if keys is not None:
            self.dealer.curve_publickey = keys.pair.public
            self.dealer.curve_secretkey = keys.pair.secret
            self.dealer.curve_serverkey = keys.pool
        self.monitor = self.dealer.get_monitor_socket()
        try:
            self.dealer.connect(lease.endpoint)
        except zmq.ZMQError as error:
            self.report = Report(lease, None, f"this is no address ({error})")
            return
        fields: payloads.Fields = {
            "student": "status",
            "fingerprint": "",
            "tokenizer_sha256": "",
            "vocab_size": 0,
        }
        hello = Message(kind=Kind.HELLO, frames=(payloads.text_frame(fields),))
        self.dealer.send_multipart(encode(hello))

    def look(self) -> None:
        """Read what has come; `report` is there when that is all that can be learned."""
        while self.report is None and self.monitor.poll(0):
            event = zmq.Event(recv_monitor_message(self.monitor)["event"])
            self._problem = DEATHS.get(event, self._problem)
            # A handshake that fails may look like this first; ZeroMQ connects again.
            if event in DEATHS and event is not zmq.Event.DISCONNECTED:
                self.report = self.given_up()
        while self.report is None and self.dealer.poll(0):
            self.report = self._take()

    def given_up(self) -> Report:
        """Give the report of a replica that is not waited for any more."""
        return self.report or Report(self._lease, None, self._problem)

    def close(self) -> None:
        """Let go of the sockets."""
        self.dealer.disable_monitor()
        self.monitor.close(0)
        self.dealer.close(0)

    def _take(self) -> Report | None:
        try:
            message = decode(self.dealer.recv_multipart(), Limits())
            if message.kind is Kind.HELLO_ACK:
                stats = Message(kind=Kind.STATS, teacher=message.teacher)
                self.dealer.send_multipart(encode(stats))
                return None
            if message.kind is Kind.STATS:
                fields = payloads.read_fields(message, payloads.STATS_FIELDS)
                return Report(self._lease, fields)
            if message.kind is Kind.GOAWAY:
                return Report(self._lease, None, "draining")
            if message.kind is Kind.ERROR:
                return Report(self._lease, None, read_error(message)[1])
        except WireError as error:
            return Report(self._lease, None, str(error))
        return None


def ask_all(leases: list[Lease], keys: StudentKeys | None) -> list[Report]:
    """Ask every replica at once, and wait `ANSWER_S` at most.

    Args:
        leases: whom to ask.
        keys: a student's; None for a pool without keys.
    """
    context = zmq.Context()
    context.max_sockets = 16_384
    asked: list[_Asked] = []
    try:
        for lease in leases:
            asked.append(_Asked(context, lease, keys))
        until = time.monotonic() + ANSWER_S
        while waiting := [one for one in asked if one.report is None]:
            left_s = until - time.monotonic()
            if left_s <= 0:
                break
            poller = zmq.Poller()
            for one in waiting:
                poller.register(one.dealer, zmq.POLLIN)
                poller.register(one.monitor, zmq.POLLIN)
            poller.poll(int(left_s * 1000) + 1)
            for one in waiting:
                one.look()
        return [one.given_up() for one in asked]
    finally:
        for one in asked:
            one.close()
        context.destroy(0)


def show(pool: Pool, keys: StudentKeys | None) -> tuple[str, int]:
    """Ask a pool's replicas; lay out what they say and who is missing, and count who answers.

    Raises:
        MachineError: the pool's folder cannot be read.
    """
    reports = ask_all(pool.leases(), keys)
    text = "\n".join(filter(None, (table(reports), pool.remarks())))
    return text, sum(report.fields is not None for report in reports)


_COLUMNS: Final = (
    ("replica", "replica", "{}"),
    ("teacher", "name", "{}"),
    ("state", "state", "{}"),
    ("up s", "uptime_s", "{:.0f}"),
    ("students", "students", "{}"),
    ("queue", "queue_requests", "{}"),
    ("tokens queued", "queue_tokens", "{:,}"),
    ("tokens", "tokens", "{:,}"),
    ("tokens/s", "tokens_per_s", "{:,.0f}"),
    ("p50 ms", "p50_ms", "{:.0f}"),
    ("p99 ms", "p99_ms", "{:.0f}"),
    ("kept", "from_ring", "{}"),
    ("shared", "joined", "{}"),
    ("busy", "busy", "{}"),
    ("failed", "failed", "{}"),
    ("refused", "refused", "{}"),
    ("GB sent", "bytes_sent", "{:.1f}"),
)


def table(reports: list[Report]) -> str:
    """Lay the answers out, a replica a line; those without an answer with the reason."""
    rows = [[heading for heading, _, _ in _COLUMNS]]
    silent = []
    for report in reports:
        if report.fields is None:
            silent.append(f"{report.lease.name} at {report.lease.endpoint}: {report.problem}")
            continue
        fields = report.fields | {"bytes_sent": report.fields["bytes_sent"] / 1e9}
        rows.append([form.format(fields[name]) for _, name, form in _COLUMNS])
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    total = sum(r.fields["tokens_per_s"] for r in reports if r.fields is not None)
    answered = len(reports) - len(silent)
    lines.append(f"{answered} of {len(reports)} replicas answer; {total:,.0f} tokens/s in all")
    return "\n".join(lines + silent)
