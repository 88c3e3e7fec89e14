"""What the replicas of a pool say of themselves, as a table."""

import time
from dataclasses import dataclass
from typing import Any, Final

import zmq

from megatron_mlr1.errors import MachineError
from megatron_mlr1.teacher import payloads
from megatron_mlr1.teacher.keys import StudentKeys
from megatron_mlr1.teacher.pool import Lease
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


def ask_all(leases: list[Lease], keys: StudentKeys | None) -> list[Report]:
    """Ask every replica at once, and wait `ANSWER_S` at most.

    Args:
        leases: whom to ask.
        keys: a student's; None for a pool without keys.

    Raises:
        MachineError: an address is of no use to ZeroMQ.
    """
    context = zmq.Context()
    poller = zmq.Poller()
    asked: dict[zmq.Socket[bytes], Lease] = {}
    reports: dict[str, Report] = {}
    try:
        for lease in leases:
            dealer = context.socket(zmq.DEALER)
            dealer.linger = 0
            dealer.maxmsgsize = Limits().max_payload_bytes
            if keys is not None:
                dealer.curve_publickey = keys.pair.public
                dealer.curve_secretkey = keys.pair.secret
                dealer.curve_serverkey = keys.pool
            dealer.connect(lease.endpoint)
            fields = {"student": "status", "fingerprint": "", "tokenizer_sha256": ""}
            hello = payloads.text_frame(fields | {"vocab_size": 0})
            dealer.send_multipart(encode(Message(kind=Kind.HELLO, frames=(hello,))))
            poller.register(dealer, zmq.POLLIN)
            asked[dealer] = lease
        until = time.monotonic() + ANSWER_S
        while len(reports) < len(asked) and (left_s := until - time.monotonic()) > 0:
            for dealer, _ in poller.poll(int(left_s * 1000)):
                report = _take(dealer, asked[dealer])
                if report is not None:
                    reports[report.lease.name] = report
    except zmq.ZMQError as error:
        raise MachineError(
            f"a replica's address cannot be used ({error}). Look at the leases in the pool."
        ) from error
    finally:
        context.destroy(0)
    return [reports.get(lease.name, Report(lease, None, "silent")) for lease in leases]


def _take(dealer: zmq.Socket[bytes], lease: Lease) -> Report | None:
    try:
        message = decode(dealer.recv_multipart(), Limits())
        if message.kind is Kind.HELLO_ACK:
            stats = Message(kind=Kind.STATS, teacher=message.teacher)
            dealer.send_multipart(encode(stats))
            return None
        if message.kind is Kind.STATS:
            return Report(lease, payloads.read_fields(message, payloads.STATS_FIELDS))
        if message.kind is Kind.GOAWAY:
            return Report(lease, None, "draining")
        if message.kind is Kind.ERROR:
            return Report(lease, None, read_error(message)[1])
    except WireError as error:
        return Report(lease, None, str(error))
    return None


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
