"""The messages between students and replicas: header, seal and sizes.

A message is a ZeroMQ multipart message: one header frame of 64 bytes, then raw frames. Everything
is little-endian. The header:

    bytes   what
    0-3     b"MLRT"
    4       version, 1
    5       kind (`Kind`)
    6       number of frames behind the header
    7       0
    8-15    u64, request: the student's own number of a request; replies carry it; 0 without one
    16-31   content key of the request (SUBMIT, ACCEPT, BUSY, DATA, CANCEL), or zeros
    32-39   first 8 bytes of the teacher's fingerprint, zeros in HELLO
    40-47   u64, value: by kind, see below
    48-55   u64, bytes of all frames behind the header
    56-63   seal of header bytes 0-55 and all frames, see `seal`

From the student:

    kind    value                       frames
    HELLO   credit                      JSON, `payloads.HELLO_FIELDS`
    ATTACH  0                           session (16 bytes); over the open data port only
    SUBMIT  credit                      spec (28 bytes), i32 tokens, i32 bounds, u32 deadline in ms
    CANCEL  credit                      none
    PING    credit                      none
    HEAD    credit                      two u32: rows [begin, end) of the head
    STATS   credit                      none

From the replica:

    HELLO_ACK  tokens in its queue      JSON, `payloads.HELLO_ACK_FIELDS`
    ATTACH     0                        none: the data port knows the student now
    ACCEPT     tokens in its queue      none: the targets will come
    BUSY       ms to wait before asking again                none
    DATA       microseconds in the replica                   the arrays of `spec.layout`, in order
    PONG       tokens in its queue      none
    GOAWAY     0                        none: with a request, it is refused; without one, the
                                        replica finishes what it accepted and takes no more
    HEAD       0                        u32 begin, u32 end; then the rows, [end - begin, d]
    STATS      0                        JSON, `payloads.STATS_FIELDS`
    ERROR      code (`Code`)            text, UTF-8

**Credit** is the number of bytes of DATA and HEAD frames that the student has had room for since
its HELLO, all told; it only rises. A replica keeps back what the credit does not cover. What the
frames hold is read and written by `payloads`.
"""

import enum
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import xxhash
from blake3 import blake3

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.content_key import KEY_BYTES
from megatron_mlr1.teacher.spec import SPEC_BYTES

MAGIC: Final = b"MLRT"
VERSION: Final = 1
HEADER: Final = struct.Struct("<4sBBBBQ16s8sQQ8s")
_SEALED_HEADER: Final = struct.Struct("<4sBBBBQ16s8sQQ")
SEAL_BYTES: Final = 8
MAX_FRAMES: Final = 4
MAX_TEXT_BYTES: Final = 64 * 1024
NO_KEY: Final = bytes(KEY_BYTES)
NO_TEACHER: Final = bytes(8)

type Buffer = bytes | bytearray | memoryview


class Kind(enum.IntEnum):
    """What a message is."""

    HELLO = 1
    HELLO_ACK = 2
    SUBMIT = 3
    ACCEPT = 4
    BUSY = 5
    DATA = 6
    CANCEL = 7
    PING = 8
    PONG = 9
    GOAWAY = 10
    HEAD = 11
    STATS = 12
    ERROR = 13
    ATTACH = 14


class Code(enum.IntEnum):
    """Why a replica refuses; the text of the ERROR says it to a person."""

    MALFORMED = 1
    """The message breaks this file's rules."""
    NO_HELLO = 2
    """The replica does not know this student: it restarted, or forgot a silent one."""
    WRONG_TEACHER = 3
    """Fingerprint, tokenizer or vocabulary differ from what the student wants."""
    WRONG_REQUEST = 4
    """Too many tokens, an id outside the vocabulary, a missing BOS, a form that cannot be made."""
    NOT_FINITE = 5
    """The teacher's states hold NaN or Inf for this request."""
    FAILED = 6
    """The teacher failed at this request (out of memory, a device error)."""


class WireError(TeacherError):
    """A message that breaks the rules of this file; the only error that reading one can raise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a reader takes; checked against lengths before anything is read or copied."""

    max_tokens: int = 131_072
    """Tokens of one request."""

    max_payload_bytes: int = 2**30
    """Bytes of all frames behind a header, of one message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message; its frames are views of what was received, or of what will be sent."""

    kind: Kind
    request: int = 0
    key: bytes = NO_KEY
    teacher: bytes = NO_TEACHER
    value: int = 0
    frames: tuple[Buffer, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all frames behind the header."""
        return sum(memoryview(frame).nbytes for frame in self.frames)


def seal(header: Buffer, frames: Sequence[Buffer], session_key: bytes | None) -> bytes:
    """Give the 8 bytes at the end of a header.

    Where the connection proves who speaks (CURVE) or never leaves the machine, XXH3-64, against
    errors of memory and disks. Over an open data port the first 8 bytes of BLAKE3 keyed with the
    32-byte session key that came over CURVE: nobody else can make it or change a byte unseen.
    """
    hasher = xxhash.xxh3_64() if session_key is None else blake3(key=session_key)
    hasher.update(memoryview(header)[: _SEALED_HEADER.size])
    for frame in frames:
        hasher.update(_as_bytes(frame))
    return hasher.digest()[:SEAL_BYTES]


def _as_bytes(frame: Buffer) -> memoryview:
    view = memoryview(frame)
    # An empty array has a shape that `cast` refuses.
    return view.cast("B") if view.nbytes else memoryview(b"")


def encode(message: Message, session_key: bytes | None = None) -> list[Buffer]:
    """Give the frames of a message, the header first; the others are the message's own, uncopied.

    Args:
        message: what to send.
        session_key: 32 bytes, where the message goes over an open data port.
    """
    assert len(message.frames) <= MAX_FRAMES, "a message has at most MAX_FRAMES frames"
    sealed = _SEALED_HEADER.pack(
        MAGIC,
        VERSION,
        message.kind,
        len(message.frames),
        0,
        message.request,
        message.key,
        message.teacher,
        message.value,
        message.num_bytes,
    )
    return [sealed + seal(sealed, message.frames, session_key), *message.frames]


def decode(parts: Sequence[Buffer], limits: Limits, session_key: bytes | None = None) -> Message:
    """Read a message without copying; checks every length before the seal, and the seal last.

    Args:
        parts: the frames as received, the header first.
        limits: what is too much.
        session_key: 32 bytes, where the message came over an open data port.

    Raises:
        WireError: it is no message of this version, is too large, is cut short, or was changed.
    """
    if not parts or memoryview(parts[0]).nbytes != HEADER.size:
        raise WireError(f"a message must begin with a header of {HEADER.size} bytes.")
    header, frames = parts[0], tuple(parts[1:])
    magic, version, kind, num_frames, zero, request, key, teacher, value, payload, mark = (
        HEADER.unpack(header)
    )
    if magic != MAGIC or zero != 0:
        raise WireError("a header must begin with the mark of this protocol; this one does not.")
    if version != VERSION:
        raise WireError(
            f"a message has version {version}; this side speaks version {VERSION}. Run the same "
            "version of megatron_mlr1 on both sides."
        )
    if kind not in _KINDS:
        raise WireError(f"a message has kind {kind}; this version does not know it.")
    num_bytes = sum(memoryview(frame).nbytes for frame in frames)
    if num_frames != len(frames) or num_frames > MAX_FRAMES or payload != num_bytes:
        raise WireError(
            f"a header names {num_frames} frames of {payload} bytes; there are {len(frames)} of "
            f"{num_bytes}."
        )
    cap = limits.max_payload_bytes if kind in (Kind.DATA, Kind.HEAD) else _small_cap(kind, limits)
    if num_bytes > cap:
        raise WireError(f"a message of kind {Kind(kind).name} has {num_bytes} bytes; {cap} fit.")
    if not hmac.compare_digest(seal(header, frames, session_key), mark):
        raise WireError(f"the seal of a message of kind {Kind(kind).name} does not fit its bytes.")
    return Message(
        kind=Kind(kind), request=request, key=key, teacher=teacher, value=value, frames=frames
    )


_KINDS: Final = frozenset(int(kind) for kind in Kind)


def _small_cap(kind: int, limits: Limits) -> int:
    if kind == Kind.SUBMIT:
        return SPEC_BYTES + 4 * limits.max_tokens + 4 * (limits.max_tokens + 1) + 4
    return MAX_TEXT_BYTES


def largest_request_frame(limits: Limits) -> int:
    """Bytes of the largest frame that a student may send; a replica's ZMQ_MAXMSGSIZE."""
    return max(MAX_TEXT_BYTES, 4 * (limits.max_tokens + 1))


def exact_frames(message: Message, count: int) -> tuple[memoryview, ...]:
    """Give the frames of a message that must have so many.

    Raises:
        WireError: it has another number of them.
    """
    if len(message.frames) != count:
        raise WireError(
            f"a message of kind {message.kind.name} has {len(message.frames)} frames; "
            f"it must have {count}."
        )
    return tuple(memoryview(frame) for frame in message.frames)


def error_message(code: Code, text: str, answered: Message | None = None) -> Message:
    """Make an ERROR, as the answer to a message where there is one."""
    words = text.encode()[:4096]
    if answered is None:
        return Message(kind=Kind.ERROR, value=code, frames=(words,))
    return Message(
        kind=Kind.ERROR, request=answered.request, key=answered.key, value=code, frames=(words,)
    )


def read_error(message: Message) -> tuple[Code, str]:
    """Read an ERROR.

    Raises:
        WireError: its code is unknown.
    """
    (frame,) = exact_frames(message, 1)
    if message.value not in set(Code):
        raise WireError(f"an ERROR has code {message.value}; this version does not know it.")
    return Code(message.value), bytes(frame).decode(errors="replace")
