import dataclasses
import hashlib
import struct

import numpy as np

from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.spec import TargetRequest, TargetSpec
from tests.support.teachers import TableTeacher, make_request

IDENTITY = TableTeacher().identity
REQUEST = make_request((3, 4), TargetSpec())


def test_a_key_never_changes():
    tokens = np.array([1, 2, 70000], "<i4")
    request = TargetRequest(tokens, np.array([0, 1, 3], "<i4"), TargetSpec(form="top_k", k=2))
    hashed = struct.pack("<I", 1) + bytes(16)
    hashed += bytes([3, 0, 0, 0]) + struct.pack("<IIQd", 2, 0, 0, 1.0)
    hashed += struct.pack("<I", 3) + struct.pack("<3i", 1, 2, 70000) + struct.pack("<3i", 0, 1, 3)
    by_hand = hashlib.blake2b(hashed, digest_size=16).digest()
    assert content_key(IDENTITY, request) == by_hand
    assert by_hand.hex() == "af9491daf97cae734ba812b5e77f5694"


def test_everything_that_decides_the_targets_changes_the_key():
    tokens, bounds = REQUEST.tokens, REQUEST.bounds
    changed = tokens.copy()
    changed[3] += 1
    others = [
        TargetRequest(changed, bounds, TargetSpec()),
        TargetRequest(tokens, np.array([0, 2, 7], "<i4"), TargetSpec()),
        TargetRequest(tokens, bounds, TargetSpec(attention="full")),
        TargetRequest(tokens, bounds, TargetSpec(bos="inject")),
        TargetRequest(tokens, bounds, TargetSpec(form="hidden_int8")),
        TargetRequest(tokens, bounds, TargetSpec(form="hidden_int8", seed=1)),
        TargetRequest(tokens, bounds, TargetSpec(form="top_k", k=3)),
        TargetRequest(tokens, bounds, TargetSpec(form="top_k", k=3, temperature=2.0)),
    ]
    keys = {content_key(IDENTITY, request) for request in [REQUEST, *others]}
    assert len(keys) == 1 + len(others)
    other_teacher = dataclasses.replace(IDENTITY, fingerprint="1" * 32)
    assert content_key(other_teacher, REQUEST) not in keys


def test_tokens_and_bounds_cannot_be_taken_for_each_other():
    one = TargetRequest(np.array([5, 0, 2], "<i4"), np.array([0, 3], "<i4"), TargetSpec())
    other = TargetRequest(np.array([5, 0], "<i4"), np.array([0, 2], "<i4"), TargetSpec())
    assert content_key(IDENTITY, one) != content_key(IDENTITY, other)


def test_what_is_only_for_people_does_not_change_the_key():
    renamed = dataclasses.replace(IDENTITY, name="another folder")
    assert content_key(renamed, REQUEST) == content_key(IDENTITY, REQUEST)


def test_a_view_of_received_bytes_has_the_same_key():
    read_only = np.frombuffer(REQUEST.tokens.tobytes(), "<i4")
    request = TargetRequest(read_only, REQUEST.bounds, REQUEST.spec)
    assert content_key(IDENTITY, request) == content_key(IDENTITY, REQUEST)
