"""What the frames behind a header hold: requests, targets, rows of the head, and fields of text."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.spec import (
    TargetRequest,
    Targets,
    TargetSpec,
    TeacherIdentity,
    layout,
)
from megatron_mlr1.teacher.wire import (
    MAX_TEXT_BYTES,
    Buffer,
    Limits,
    Message,
    WireError,
    exact_frames,
)

# SUBMIT


@dataclass(frozen=True, slots=True)
class Submission:
    """What a SUBMIT holds."""

    request: TargetRequest
    deadline_ms: int
    """When the targets are wanted, counted from the arrival; earlier ones are computed first."""


def submit_frames(request: TargetRequest, deadline_ms: int) -> tuple[Buffer, ...]:
    """Give the frames of a SUBMIT; tokens and bounds are the request's own memory."""
    deadline = struct.pack("<I", min(max(deadline_ms, 0), 2**32 - 1))
    return (request.spec.pack(), request.tokens.data, request.bounds.data, deadline)


def read_submit(message: Message, limits: Limits) -> Submission:
    """Read the frames of a SUBMIT; the arrays are views of them.

    Raises:
        WireError: they are no request, or one of more tokens than the limit.
    """
    spec, tokens, bounds, deadline = exact_frames(message, 4)
    if deadline.nbytes != 4 or tokens.nbytes % 4 or bounds.nbytes % 4:
        raise WireError("tokens, bounds and deadline of a request must be of 4 bytes each.")
    if tokens.nbytes > 4 * limits.max_tokens:
        raise WireError(f"a request has {tokens.nbytes // 4} tokens; {limits.max_tokens} fit.")
    try:
        request = TargetRequest(
            np.frombuffer(tokens, "<i4"),
            np.frombuffer(bounds, "<i4"),
            TargetSpec.unpack(bytes(spec)),
        )
    except TeacherError as error:
        raise WireError(str(error)) from error
    return Submission(request, struct.unpack("<I", deadline)[0])


# DATA


def data_frames(targets: Targets) -> tuple[Buffer, ...]:
    """Give the frames of a DATA: the arrays' own memory."""
    return tuple(np.ascontiguousarray(array).data for array in targets.arrays.values())


def read_data(message: Message, spec: TargetSpec, identity: TeacherIdentity, rows: int) -> Targets:
    """Read the frames of a DATA as the targets of a request of this spec and number of rows.

    The arrays are read-only views of the frames. `Targets.check` looks at their numbers.

    Raises:
        WireError: number or length of the frames are not those of the targets.
    """
    wanted = layout(spec, identity, rows)
    frames = exact_frames(message, len(wanted))
    for array, frame in zip(wanted, frames, strict=True):
        if frame.nbytes != array.num_bytes:
            raise WireError(
                f"{array.name} of {rows} rows has {frame.nbytes} bytes; it must have "
                f"{array.num_bytes}."
            )
    return Targets(
        spec,
        {
            array.name: np.frombuffer(frame, array.dtype).reshape(array.shape)
            for array, frame in zip(wanted, frames, strict=True)
        },
    )


# HEAD


def head_range_frame(begin: int, end: int) -> bytes:
    """Give the frame that names rows [begin, end) of the head."""
    return struct.pack("<II", begin, end)


def read_head_range(message: Message, vocab_size: int) -> tuple[int, int]:
    """Read the first frame of a HEAD, of either side.

    Raises:
        WireError: there is none, or the range is empty or outside the vocabulary.
    """
    frame = memoryview(message.frames[0]) if message.frames else memoryview(b"")
    if frame.nbytes != 8:
        raise WireError(f"a range of the head has {frame.nbytes} bytes; it must have 8.")
    begin, end = struct.unpack("<II", frame)
    if not begin < end <= vocab_size:
        raise WireError(f"rows [{begin}, {end}) of the head are asked for; it has {vocab_size}.")
    return begin, end


def read_head(message: Message, identity: TeacherIdentity) -> tuple[int, np.ndarray[Any, Any]]:
    """Read a replica's HEAD: the first row's number, and the rows as a read-only view.

    The rows are [rows, d] of `TeacherIdentity.state_dtype`.

    Raises:
        WireError: range and bytes do not belong together.
    """
    _, rows = exact_frames(message, 2)
    begin, end = read_head_range(message, identity.vocab_size)
    must_be = (end - begin) * identity.hidden_size * identity.state_dtype.itemsize
    if rows.nbytes != must_be:
        raise WireError(
            f"rows [{begin}, {end}) of the head have {rows.nbytes} bytes; they must have {must_be}."
        )
    return begin, np.frombuffer(rows, identity.state_dtype).reshape(-1, identity.hidden_size)


# JSON: HELLO, HELLO_ACK, STATS

type Fields = Mapping[str, str | int | float | None]

HELLO_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "student": (str,),
    "fingerprint": (str,),
    "tokenizer_sha256": (str,),
    "vocab_size": (int,),
}
"""`student`: a name for people. The others: what the student wants, "" or 0 for any."""

HELLO_ACK_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "fingerprint": (str,),
    "name": (str,),
    "tokenizer_sha256": (str,),
    "vocab_size": (int,),
    "hidden_size": (int,),
    "dtype": (str,),
    "numerics": (str,),
    "bos_id": (int, type(None)),
    "max_tokens": (int,),
    "max_head_rows": (int,),
    "data_endpoint": (str,),
    "session": (str,),
    "session_key": (str,),
}
"""The identity; the replica's limits; and its open data port, or "" where replies come back over
the same connection. `session` (32 hex digits) names the student there, and `session_key` (64 hex
digits) seals what goes over it."""

STATS_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "replica": (str,),
    "name": (str,),
    "state": (str,),
    "uptime_s": (float,),
    "students": (int,),
    "queue_requests": (int,),
    "queue_tokens": (int,),
    "requests": (int,),
    "tokens": (int,),
    "tokens_per_s": (float,),
    "p50_ms": (float,),
    "p99_ms": (float,),
    "from_ring": (int,),
    "joined": (int,),
    "busy": (int,),
    "cancelled": (int,),
    "failed": (int,),
    "refused": (int,),
    "bytes_sent": (int,),
}
"""`state` is serving or draining. `requests` and `tokens` were computed; `from_ring` were answered
from kept results and `joined` shared a computation; `tokens_per_s` is the last minute's; p50 and
p99 are from arrival to reply, of the last 1,000."""


def text_frame(fields: Fields) -> bytes:
    """Give the frame of a HELLO, HELLO_ACK or STATS."""
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()


def read_fields(message: Message, schema: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Read the frame of a HELLO, HELLO_ACK or STATS: one flat object with exactly these fields.

    Raises:
        WireError: it is too long, no JSON, or has other fields or types.
    """
    (frame,) = exact_frames(message, 1)
    if frame.nbytes > MAX_TEXT_BYTES:
        raise WireError(f"{message.kind.name} has {frame.nbytes} bytes; {MAX_TEXT_BYTES} fit.")
    try:
        fields = json.loads(bytes(frame).decode())
    except (ValueError, RecursionError) as error:
        raise WireError(f"{message.kind.name} holds no JSON.") from error
    if not isinstance(fields, dict) or fields.keys() != schema.keys():
        raise WireError(f"{message.kind.name} must hold the fields {', '.join(schema)}.")
    for name, types in schema.items():
        if type(fields[name]) not in types:
            raise WireError(f"{message.kind.name}: {name} must be {types[0].__name__}.")
    return fields


def read_identity(fields: Mapping[str, Any]) -> TeacherIdentity:
    """Take the teacher's identity out of the fields of a HELLO_ACK.

    Raises:
        WireError: a field is outside of its range.
    """
    names = TeacherIdentity.__dataclass_fields__
    identity = TeacherIdentity(**{name: fields[name] for name in names})
    try:
        is_sound = len(bytes.fromhex(identity.fingerprint)) == 16 and bool(identity.state_dtype)
    except (ValueError, KeyError):
        is_sound = False
    if not is_sound or min(identity.vocab_size, identity.hidden_size) < 1:
        raise WireError(
            "these fields name no teacher: fingerprint, type or a size is outside of its range."
        )
    return identity
