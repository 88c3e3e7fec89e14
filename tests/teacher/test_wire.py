import random
import struct
import tracemalloc

import numpy as np
import pytest
import xxhash
from blake3 import blake3

from megatron_mlr1.teacher import payloads
from megatron_mlr1.teacher.spec import Targets, TargetSpec
from megatron_mlr1.teacher.wire import (
    HEADER,
    MAX_TEXT_BYTES,
    Code,
    Kind,
    Limits,
    Message,
    WireError,
    decode,
    encode,
    error_message,
    largest_request_frame,
    read_error,
    seal,
)
from tests.support.teachers import TableTeacher, make_request

LIMITS = Limits(max_tokens=64, max_payload_bytes=4096)
IDENTITY = TableTeacher().identity
SESSION_KEY = bytes(range(32))


def samples():
    """One of each kind, as its sender makes it."""
    request = make_request((5, 6), TargetSpec(form="hybrid", k=2, m=3, seed=4))
    targets = Targets(TargetSpec(), {"hidden": np.ones((11, 8), "<f4")})
    hello = {"student": "s", "fingerprint": "", "tokenizer_sha256": "", "vocab_size": 0}
    frames = {
        Kind.HELLO: (payloads.text_frame(hello),),
        Kind.SUBMIT: payloads.submit_frames(request, 1000),
        Kind.DATA: payloads.data_frames(targets),
        Kind.HEAD: (payloads.head_range_frame(2, 4), np.ones((2, 8), "<f4").data),
        Kind.ATTACH: (bytes(16),),
        Kind.ERROR: error_message(Code.FAILED, "why").frames,
    }
    return [
        Message(
            kind=kind,
            request=7,
            key=bytes(range(16)),
            teacher=IDENTITY.short,
            value=int(Code.FAILED) if kind is Kind.ERROR else 9,
            frames=frames.get(kind, ()),
        )
        for kind in Kind
    ]


def as_bytes(message, session_key=None):
    return [bytes(part) for part in encode(message, session_key)]


def test_the_header_has_the_bytes_of_the_docs():
    message = Message(
        kind=Kind.ERROR,
        request=0x0102030405060708,
        key=bytes(range(16)),
        teacher=b"teacher!",
        value=5,
        frames=(b"no",),
    )
    header, frame = as_bytes(message)
    sealed = bytes.fromhex(
        "4d4c5254 01 0d 01 00 0807060504030201 000102030405060708090a0b0c0d0e0f"
        "7465616368657221 0500000000000000 0200000000000000"
    )
    assert len(header) == HEADER.size == 64
    assert header == sealed + xxhash.xxh3_64_digest(sealed + b"no")
    assert header[56:].hex() == "405f84557a2c80b4"
    assert frame == b"no"


def test_the_kinds_and_codes_have_the_numbers_of_the_first_version():
    kinds = (
        "HELLO HELLO_ACK SUBMIT ACCEPT BUSY DATA CANCEL PING PONG GOAWAY HEAD STATS ERROR ATTACH"
    )
    assert [kind.name for kind in sorted(Kind)] == kinds.split()
    codes = "MALFORMED NO_HELLO WRONG_TEACHER WRONG_REQUEST NOT_FINITE FAILED"
    assert [code.name for code in sorted(Code)] == codes.split()


def test_the_seal_of_the_open_port_is_keyed_blake3():
    header, frame = as_bytes(Message(kind=Kind.DATA, frames=(b"rows",)), SESSION_KEY)
    assert header[56:] == blake3(header[:56] + frame, key=SESSION_KEY).digest()[:8]


@pytest.mark.parametrize("session_key", [None, SESSION_KEY], ids=["main port", "open port"])
@pytest.mark.parametrize("message", samples(), ids=lambda message: message.kind.name)
def test_a_message_is_read_as_it_was_sent(message, session_key):
    read = decode(as_bytes(message, session_key), LIMITS, session_key)
    assert (read.kind, read.request, read.key) == (message.kind, message.request, message.key)
    assert (read.teacher, read.value) == (message.teacher, message.value)
    assert [bytes(f) for f in read.frames] == [bytes(f) for f in message.frames]


def test_frames_are_not_copied_on_either_side():
    rows = np.ones((11, 8), "<f4")
    parts = encode(
        Message(
            kind=Kind.DATA, frames=payloads.data_frames(Targets(TargetSpec(), {"hidden": rows}))
        )
    )
    read = payloads.read_data(decode(parts, LIMITS), TargetSpec(), IDENTITY, 11)
    assert np.shares_memory(read.arrays["hidden"], rows)


@pytest.mark.parametrize("message", samples(), ids=lambda message: message.kind.name)
def test_any_changed_bit_is_noticed(message):
    for key in (None, SESSION_KEY):
        parts = as_bytes(message, key)
        for number, part in enumerate(parts):
            for place in {0, len(part) // 2, len(part) - 1} - {-1}:
                changed = bytearray(part)
                changed[place] ^= 0x10
                with pytest.raises(WireError):
                    decode([*parts[:number], changed, *parts[number + 1 :]], LIMITS, key)


def test_a_seal_of_another_session_is_refused():
    parts = as_bytes(Message(kind=Kind.DATA, frames=(b"rows",)), SESSION_KEY)
    for other in (None, bytes(32)):
        with pytest.raises(WireError, match="seal"):
            decode(parts, LIMITS, other)


def test_a_message_that_is_cut_short_is_refused():
    header, *frames = as_bytes(samples()[2])
    for parts in ([], [header], [header[:-1], *frames], [header, *frames[:-1]], [b"", *frames]):
        with pytest.raises(WireError):
            decode(parts, LIMITS)
    with pytest.raises(WireError):
        decode([header, *frames, b"more"], LIMITS)


def test_another_version_says_what_to_do():
    parts = as_bytes(samples()[0])
    parts[0] = parts[0][:4] + b"\x02" + parts[0][5:]
    with pytest.raises(WireError, match="same version"):
        decode(parts, LIMITS)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (Kind.DATA, 4097),
        (Kind.HEAD, 4097),
        (Kind.SUBMIT, 1024),
        (Kind.HELLO, MAX_TEXT_BYTES + 1),
        (Kind.PING, MAX_TEXT_BYTES + 1),
    ],
)
def test_a_message_above_its_cap_is_refused_before_it_is_hashed(kind, size):
    parts = as_bytes(Message(kind=kind, frames=(bytes(size),)))
    parts[0] = parts[0][:56] + bytes(8)
    with pytest.raises(WireError, match="fit"):
        decode(parts, LIMITS)


def test_a_header_that_promises_more_than_comes_is_refused_without_room_for_it():
    parts = as_bytes(Message(kind=Kind.DATA, frames=(b"rows",)))
    parts[0] = parts[0][:48] + struct.pack("<Q", 2**60) + parts[0][56:]
    tracemalloc.start()
    with pytest.raises(WireError):
        decode(parts, Limits(max_payload_bytes=2**62))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**16


def test_an_error_has_a_code_and_words():
    message = error_message(Code.NOT_FINITE, "x" * 10_000, samples()[2])
    code, text = read_error(decode(as_bytes(message), LIMITS))
    assert (code, len(text)) == (Code.NOT_FINITE, 4096)
    assert message.request == 7
    with pytest.raises(WireError):
        read_error(Message(kind=Kind.ERROR, value=99, frames=(b"",)))


def test_the_largest_request_fits_the_sockets_limit():
    request = make_request((1,) * 64, TargetSpec())
    frames = payloads.submit_frames(request, 0)
    largest = max(memoryview(frame).nbytes for frame in frames)
    assert largest <= largest_request_frame(LIMITS)
    decode(as_bytes(Message(kind=Kind.SUBMIT, frames=frames)), LIMITS)


def read_all(parts):
    """Read a message as far as the two sides do."""
    message = decode(parts, LIMITS)
    if message.kind is Kind.SUBMIT:
        payloads.read_submit(message, LIMITS)
    elif message.kind is Kind.DATA:
        payloads.read_data(message, TargetSpec(), IDENTITY, 11)
    elif message.kind is Kind.HEAD:
        payloads.read_head(message, IDENTITY)
    elif message.kind is Kind.ERROR:
        read_error(message)
    elif message.kind is Kind.HELLO:
        payloads.read_fields(message, payloads.HELLO_FIELDS)
    elif message.kind is Kind.HELLO_ACK:
        payloads.read_identity(payloads.read_fields(message, payloads.HELLO_ACK_FIELDS))


def mutate(parts, source):
    """Change bytes, lengths and number of frames; then often make the seal right again."""
    parts = [bytearray(part) for part in parts]
    for _ in range(source.randint(1, 4)):
        part = source.choice(parts)
        how = source.randrange(6)
        if how == 0 and part:
            part[source.randrange(len(part))] = source.randrange(256)
        elif how == 1 and part:
            del part[source.randrange(len(part)) :]
        elif how == 2:
            part += source.randbytes(source.randint(1, 40))
        elif how == 3 and len(parts) > 1:
            parts.remove(part)
        elif how == 4:
            parts.insert(source.randint(1, len(parts)), bytearray(source.randbytes(8)))
        elif len(part) >= 8:
            place = source.randrange(len(part) - 7)
            edge = source.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            part[place : place + 8] = struct.pack("<Q", edge)
    if len(parts[0]) == HEADER.size and source.random() < 0.7:
        parts[0][:4] = b"MLRT"
        parts[0][4], parts[0][6], parts[0][7] = 1, (len(parts) - 1) & 0xFF, 0
        parts[0][48:56] = struct.pack("<Q", sum(map(len, parts[1:])))
        parts[0][56:] = seal(bytes(parts[0]), parts[1:], None)
    return parts


def fuzz(rounds, seed):
    source = random.Random(seed)
    messages = [as_bytes(message) for message in samples()]
    hello_ack = {
        name: 1 if int in types else "00" for name, types in payloads.HELLO_ACK_FIELDS.items()
    }
    text = payloads.text_frame(hello_ack)
    messages.append(as_bytes(Message(kind=Kind.HELLO_ACK, frames=(text,))))
    refused = 0
    for _ in range(rounds):
        try:
            read_all(mutate(source.choice(messages), source))
        except WireError:
            refused += 1
    return refused


def test_mutated_messages_are_read_or_refused():
    refused = fuzz(50_000, seed=1)
    assert 25_000 < refused < 50_000, "the mutations must reach past the seal, and mostly be wrong"


def test_mutated_messages_never_ask_for_much_memory():
    tracemalloc.start()
    fuzz(2_000, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.slow
def test_a_million_mutated_messages_are_read_or_refused():
    assert fuzz(1_000_000, seed=2) > 500_000
