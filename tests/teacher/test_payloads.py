import json
import struct

import numpy as np
import pytest

from megatron_mlr1.teacher import payloads
from megatron_mlr1.teacher.spec import Targets, TargetSpec, layout
from megatron_mlr1.teacher.wire import Kind, Limits, Message, WireError
from tests.support.teachers import TableTeacher, make_request

LIMITS = Limits(max_tokens=16)
IDENTITY = TableTeacher().identity
HELLO = {"student": "s", "fingerprint": "", "tokenizer_sha256": "", "vocab_size": 0}


def message(kind, *frames):
    return Message(kind=kind, frames=frames)


def test_a_request_is_read_as_it_was_sent():
    request = make_request((5, 6), TargetSpec(form="top_k", k=3, bos="inject"))
    read = payloads.read_submit(message(Kind.SUBMIT, *payloads.submit_frames(request, 77)), LIMITS)
    assert read.deadline_ms == 77
    assert read.request.spec == request.spec
    np.testing.assert_array_equal(read.request.tokens, request.tokens)
    np.testing.assert_array_equal(read.request.bounds, request.bounds)
    assert np.shares_memory(read.request.tokens, request.tokens)


def test_a_deadline_outside_of_its_range_is_cut_to_it():
    frames = payloads.submit_frames(make_request((2,), TargetSpec()), -5)
    assert struct.unpack("<I", frames[3])[0] == 0
    frames = payloads.submit_frames(make_request((2,), TargetSpec()), 2**40)
    assert struct.unpack("<I", frames[3])[0] == 2**32 - 1


def test_a_request_of_too_many_tokens_is_refused():
    frames = payloads.submit_frames(make_request((17,), TargetSpec()), 0)
    with pytest.raises(WireError, match="17 tokens"):
        payloads.read_submit(message(Kind.SUBMIT, *frames), LIMITS)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("change", [lambda b: b + b"\x01", lambda b: b[:-1], lambda b: b""])
def test_a_request_with_a_frame_of_a_wrong_length_is_refused(number, change):
    frames = [bytes(f) for f in payloads.submit_frames(make_request((5, 6), TargetSpec()), 0)]
    frames[number] = change(frames[number])
    with pytest.raises(WireError):
        payloads.read_submit(message(Kind.SUBMIT, *frames), LIMITS)


@pytest.mark.parametrize(
    "spec",
    [TargetSpec(), TargetSpec(form="hidden_int8"), TargetSpec(form="hybrid", k=3, m=2)],
    ids=lambda spec: spec.form,
)
def test_targets_are_read_as_they_were_sent(spec):
    random = np.random.default_rng(0)
    arrays = {
        a.name: random.integers(0, 100, a.shape).astype(a.dtype) for a in layout(spec, IDENTITY, 9)
    }
    sent = message(Kind.DATA, *payloads.data_frames(Targets(spec, arrays)))
    read = payloads.read_data(sent, spec, IDENTITY, 9)
    assert read.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read.arrays[name], array)
    with pytest.raises(WireError):
        payloads.read_data(sent, spec, IDENTITY, 8)


def test_rows_of_the_head_are_read_with_their_place():
    rows = np.arange(16, dtype="<f4").reshape(2, 8)
    sent = message(Kind.HEAD, payloads.head_range_frame(3, 5), rows.data)
    begin, read = payloads.read_head(sent, IDENTITY)
    assert begin == 3
    np.testing.assert_array_equal(read, rows)


@pytest.mark.parametrize(("begin", "end"), [(3, 3), (4, 3), (255, 257), (0, 2**32 - 1)])
def test_a_range_outside_of_the_vocabulary_is_refused(begin, end):
    with pytest.raises(WireError, match="head"):
        payloads.read_head_range(message(Kind.HEAD, payloads.head_range_frame(begin, end)), 256)


def test_fields_are_read_as_they_were_sent():
    assert (
        payloads.read_fields(message(Kind.HELLO, payloads.text_frame(HELLO)), payloads.HELLO_FIELDS)
        == HELLO
    )


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        json.dumps(HELLO | {"more": 1}).encode(),
        json.dumps({"student": "s"}).encode(),
        json.dumps(HELLO | {"vocab_size": "1"}).encode(),
        json.dumps(HELLO | {"vocab_size": True}).encode(),
        json.dumps(HELLO | {"vocab_size": 1.0}).encode(),
        b'{"vocab_size":' + b"9" * 5000 + b"}",
        json.dumps(HELLO | {"student": "s" * 70_000}).encode(),
    ],
    ids=lambda text: text[:20].decode(errors="replace"),
)
def test_text_that_is_not_the_fields_is_refused(text):
    with pytest.raises(WireError):
        payloads.read_fields(message(Kind.HELLO, text), payloads.HELLO_FIELDS)


def identity_fields(**changes):
    import dataclasses

    return dataclasses.asdict(IDENTITY) | changes


def test_an_identity_is_read_from_its_fields():
    assert payloads.read_identity(identity_fields()) == IDENTITY


@pytest.mark.parametrize(
    "changes",
    [{"fingerprint": "xy"}, {"fingerprint": "00"}, {"dtype": "float8"}, {"vocab_size": 0}],
    ids=str,
)
def test_an_identity_that_is_none_is_refused(changes):
    with pytest.raises(WireError):
        payloads.read_identity(identity_fields(**changes))
