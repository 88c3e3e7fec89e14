"""Measure how fast a replica's hidden states reach students over loopback, and what that costs.

A replica and each student are processes of their own. The replica is the product's, with a teacher
that answers at once, so that only the wire is measured; a student asks for one micro-batch after
another (4 sequences of 4,096 tokens, 8,192 bytes a token) and checks every seal and every number,
as the client of a training does. The peer, in the same run, is a pair of plain Python sockets that
moves as many bytes with `sendall` and `recv_into`, and checks nothing.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from megatron_mlr1.ending import clean_exit
from megatron_mlr1.teacher import payloads
from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.keys import (
    make_pair,
    read_pool_keys,
    read_student_keys,
)
from megatron_mlr1.teacher.memory import keep_large_blocks
from megatron_mlr1.teacher.ports import IO_THREADS
from megatron_mlr1.teacher.replica import Replica, ReplicaOptions
from megatron_mlr1.teacher.spec import TargetRequest, Targets, TargetSpec, TeacherIdentity
from megatron_mlr1.teacher.wire import Kind, Limits, Message, decode, encode

RESULT: Final = Path(__file__).parent / "results" / "teacher_wire.md"
ROWS, WIDTH, SEQUENCES = 4096, 4096, 4
WARM_UP_S: Final = 1.5
"""Memory that a virtual machine has not touched for a while costs several times a copy."""
REPLY_BYTES: Final = ROWS * WIDTH * 2
LOCAL: Final = "tcp://127.0.0.1:*"
MODES: Final = {
    "sockets": "plain Python sockets, unchecked (the peer)",
    "plain": "ZeroMQ, XXH3 seal (`--insecure-loopback`)",
    "open": "ZeroMQ, keyed BLAKE3 seal (`--open-data-bind`)",
    "curve": "ZeroMQ, CURVE",
}


class ReadyTeacher:
    """Answers every request with the same rows, at once."""

    max_tokens = ROWS

    def __init__(self) -> None:
        """Make the rows."""
        self.identity = TeacherIdentity(
            fingerprint="0" * 32,
            name="ready",
            tokenizer_sha256="",
            vocab_size=128256,
            hidden_size=WIDTH,
            dtype="bfloat16",
            numerics="none",
        )
        self._rows = np.random.default_rng(0).integers(0, 2**14, (ROWS, WIDTH), np.uint16)

    def refuse(self, request: TargetRequest) -> None:
        """Take all requests."""

    def targets(self, request: TargetRequest, key: bytes) -> Targets:
        """Give the rows."""
        return Targets(request.spec, {"hidden": self._rows[: request.rows]})

    def head_rows(self, begin: int, end: int) -> Any:
        """Give rows of no head."""
        return self._rows[begin:end]


def serve(mode: str, keys: Path) -> None:
    """Serve until the input ends, then print the CPU seconds that serving took."""
    if mode == "sockets":
        _serve_sockets()
        return
    options = ReplicaOptions(
        name="bench",
        bind=LOCAL,
        data_bind=LOCAL if mode == "open" else None,
        keys=None if mode == "plain" else read_pool_keys(keys),
        max_queue_tokens=2**24,
        held_bytes=2**31,
    )
    replica = Replica(ReadyTeacher(), options)
    print(replica.endpoint, flush=True)

    def wait() -> None:
        sys.stdin.read()
        replica.drain()

    threading.Thread(target=wait).start()
    begin = time.process_time()
    replica.run()
    print(time.process_time() - begin)


def _serve_sockets() -> None:
    rows = memoryview(bytes(REPLY_BYTES))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def answer(connection: socket.socket) -> None:
        with suppress(ConnectionError):
            while connection.recv(1):
                connection.sendall(rows)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    begin = time.process_time()
    sys.stdin.read()
    print(time.process_time() - begin, flush=True)


@dataclass(frozen=True, slots=True)
class Heard:
    """What one student measured."""

    num_bytes: int
    seconds: float
    cpu_s: float
    latencies_s: list[float]
    num_bytes_in_all: int
    """With those of the warm-up."""


class Counting:
    """Counts answers for some seconds, after a warm-up."""

    def __init__(self, seconds: float) -> None:
        """Begin the warm-up."""
        self._seconds, self._is_warm, self._in_all = seconds, False, 0
        self._restart()

    def _restart(self) -> None:
        self._latencies: list[float] = []
        self._cpu, self._begin = time.process_time(), time.perf_counter()

    def goes_on(self) -> bool:
        """Whether there is more to count."""
        took = time.perf_counter() - self._begin
        if not self._is_warm and took > WARM_UP_S:
            self._is_warm = True
            self._restart()
            return True
        return not self._is_warm or took < self._seconds

    def answered(self, latency_s: float) -> None:
        """Count an answer."""
        self._in_all += 1
        self._latencies.append(latency_s)

    def heard(self) -> Heard:
        """Give what was counted."""
        return Heard(
            num_bytes=len(self._latencies) * REPLY_BYTES,
            seconds=time.perf_counter() - self._begin,
            cpu_s=time.process_time() - self._cpu,
            latencies_s=self._latencies,
            num_bytes_in_all=self._in_all * REPLY_BYTES,
        )


def ask_sockets(port: int, seconds: float) -> Heard:
    """Read replies with plain sockets, `SEQUENCES` of them ahead."""
    connection = socket.create_connection(("127.0.0.1", port))
    buffer = memoryview(bytearray(REPLY_BYTES))
    asked: list[float] = []
    counting = Counting(seconds)
    for _ in range(SEQUENCES):
        connection.sendall(b"?")
        asked.append(time.perf_counter())
    while counting.goes_on():
        place = 0
        while place < REPLY_BYTES:
            place += connection.recv_into(buffer[place:])
        counting.answered(time.perf_counter() - asked.pop(0))
        connection.sendall(b"?")
        asked.append(time.perf_counter())
    return counting.heard()


class Student:
    """Asks a replica for random sequences, and takes the answers."""

    def __init__(self, endpoint: str, mode: str, keys: Path) -> None:
        """Connect and greet."""
        self._context = zmq.Context(IO_THREADS)
        # Answers that are still on their way are not waited for.
        self._context.linger = 0
        self._control = self._context.socket(zmq.DEALER)
        if mode != "plain":
            own = read_student_keys(keys, "bench")
            self._control.curve_publickey = own.pair.public
            self._control.curve_secretkey = own.pair.secret
            self._control.curve_serverkey = own.pool
        self._control.connect(endpoint)
        fields: payloads.Fields = {
            "student": "bench",
            "fingerprint": "",
            "tokenizer_sha256": "",
            "vocab_size": 0,
        }
        hello = Message(kind=Kind.HELLO, frames=(payloads.text_frame(fields),), value=2**62)
        self._control.send_multipart(encode(hello))
        answer = decode(self._control.recv_multipart(), Limits())
        ack = payloads.read_fields(answer, payloads.HELLO_ACK_FIELDS)
        self._identity = payloads.read_identity(ack)
        self._data = self._control
        self._session_key: bytes | None = None
        if mode == "open":
            self._attach(ack)
        self._random = np.random.default_rng(os.getpid())
        self._asked: dict[int, float] = {}

    def _attach(self, ack: dict[str, Any]) -> None:
        self._session_key = bytes.fromhex(ack["session_key"])
        self._data = self._context.socket(zmq.DEALER)
        self._data.connect(ack["data_endpoint"])
        attach = Message(kind=Kind.ATTACH, frames=(bytes.fromhex(ack["session"]),))
        self._data.send_multipart(encode(attach, self._session_key))
        self._data.recv_multipart()

    def ask(self, number: int) -> None:
        """Ask for a sequence that nobody asked for before."""
        tokens = self._random.integers(0, 128256, ROWS).astype("<i4")
        request = TargetRequest(tokens, np.array([0, ROWS], "<i4"), TargetSpec())
        message = Message(
            kind=Kind.SUBMIT,
            request=number,
            key=content_key(self._identity, request),
            teacher=self._identity.short,
            value=2**62,
            frames=payloads.submit_frames(request, 1000),
        )
        self._asked[number] = time.perf_counter()
        self._control.send_multipart(encode(message), copy=False)

    def take(self) -> tuple[int, float] | None:
        """Wait for a message; give number and seconds of a checked answer."""
        while not self._data.poll(100):
            while self._data is not self._control and self._control.poll(0):
                self._control.recv_multipart()
        parts = self._data.recv_multipart(copy=False)
        message = decode([part.buffer for part in parts], Limits(), self._session_key)
        if message.kind is not Kind.DATA:
            return None
        targets = payloads.read_data(message, TargetSpec(), self._identity, ROWS)
        targets.check(self._identity, ROWS)
        return message.request, time.perf_counter() - self._asked.pop(message.request)


def ask_replica(endpoint: str, mode: str, keys: Path, seconds: float) -> Heard:
    """Read replies of a replica, `SEQUENCES` of them ahead, and check them."""
    student = Student(endpoint, mode, keys)
    counting = Counting(seconds)
    for number in range(SEQUENCES):
        student.ask(number)
    while counting.goes_on():
        answer = student.take()
        if answer is not None:
            counting.answered(answer[1])
            student.ask(answer[0] + SEQUENCES)
    return counting.heard()


def measure(mode: str, num_students: int, seconds: float, keys: Path) -> dict[str, float]:
    """Run one replica and some students for some seconds."""
    words = [sys.executable, __file__, "--mode", mode, "--folder", str(keys)]
    server = subprocess.Popen(
        [*words, "--side", "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    where = server.stdout.readline().strip()
    ask = [*words, "--side", "ask", "--where", where, "--seconds", str(seconds)]
    students = [
        subprocess.Popen(ask, stdout=subprocess.PIPE, text=True) for _ in range(num_students)
    ]
    answers = [student.communicate()[0] for student in students]
    last_words = server.communicate("")[0].split()
    heard = [Heard(**json.loads(answer)) for answer in answers]
    moved = sum(one.num_bytes for one in heard) / 1e9
    latencies = [latency for one in heard for latency in one.latencies_s]
    rates = [one.num_bytes / one.seconds / 1e9 for one in heard]
    return {
        "rate": statistics.mean(rates),
        "total": sum(rates),
        "p50": float(np.percentile(latencies, 50)) * 1000,
        "p99": float(np.percentile(latencies, 99)) * 1000,
        "student_cpu": sum(one.cpu_s for one in heard) / moved,
        "replica_cpu": float(last_words[-1]) * 1e9 / sum(one.num_bytes_in_all for one in heard),
    }


def table(results: list[tuple[str, int, dict[str, float]]], seconds: float, load: float) -> str:
    """Give the measurements as Markdown, with the machine and the versions."""
    lines = [
        "# The teacher's wire",
        "",
        f"Hidden states over loopback: replies of {ROWS:,} rows of {WIDTH * 2:,} bytes "
        f"({REPLY_BYTES / 1e6:.1f} MB), {SEQUENCES} asked for ahead by each student, "
        f"{seconds:g} s each after {WARM_UP_S:g} s of warm-up. Latency is from asking to the "
        "checked reply, so with the wait for those before it.",
        "",
        "| wire | students | GB/s a student | GB/s in all | p50 ms | p99 ms "
        "| CPU s a GB, student | CPU s a GB, replica |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {MODES[mode]} | {number} | {one['rate']:.2f} | {one['total']:.2f} "
            f"| {one['p50']:.0f} | {one['p99']:.0f} "
            f"| {one['student_cpu']:.2f} | {one['replica_cpu']:.2f} |"
            for mode, number, one in results
        ),
        "",
        f"{platform.machine()}, {os.cpu_count()} cores shared by both ends, load before the start "
        f"{load:.1f}; Python {platform.python_version()}, pyzmq {version('pyzmq')} (libzmq "
        f"{zmq.zmq_version()}), blake3 {version('blake3')}, xxhash {version('xxhash')}. A student "
        "GPU at 60,000 tokens/s takes in 0.49 GB/s.",
        "",
        "Measured by `python -m benchmarks.bench_teacher_wire --save`.",
    ]
    return "\n".join(lines) + "\n"


def compare(options: argparse.Namespace) -> None:
    """Measure every wire with every number of students, and print."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder)
        make_pair(keys, "pool")
        make_pair(keys / "students", "bench")
        results = [
            (mode, number, measure(mode, number, options.seconds, keys))
            for number in options.students
            for mode in MODES
        ]
    text = table(results, options.seconds, load)
    print(text)
    if options.save:
        RESULT.write_text(text, "utf-8")


def main() -> None:
    """Compare, or be one of the processes that are compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement")
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULT.name}")
    for flag in ("--side", "--mode", "--where"):  # of the child processes
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is None:
        compare(options)
        return
    keep_large_blocks()
    if options.side == "serve":
        serve(options.mode, options.folder)
    elif options.mode == "sockets":
        print(json.dumps(_fields(ask_sockets(int(options.where), options.seconds))))
    else:
        heard = ask_replica(options.where, options.mode, options.folder, options.seconds)
        print(json.dumps(_fields(heard)))


def _fields(heard: Heard) -> dict[str, Any]:
    return {name: getattr(heard, name) for name in Heard.__slots__}


if __name__ == "__main__":
    with clean_exit():
        main()
