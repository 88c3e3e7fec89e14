"""The name of a target: a hash of what decides its bits, and of nothing else."""

import hashlib
import struct
from typing import Final

from megatron_mlr1.teacher.spec import TargetRequest, TeacherIdentity

PROTOCOL_VERSION: Final = 1
"""Raised when the same request would give other targets or other bytes."""

KEY_BYTES: Final = 16


def content_key(identity: TeacherIdentity, request: TargetRequest) -> bytes:
    """Name the targets of one sequence by BLAKE2b-128 (RFC 7693), 16 bytes.

    Over, in this order: protocol version (u32), the teacher's fingerprint (16 bytes), the packed
    spec (28 bytes: form, attention, BOS policy, k, m, seed, temperature), T (u32), the tokens
    (i32[T]), the bounds (i32[D + 1]); all little-endian. Step, rank, batch and layout do not take
    part, so a request that is made again, by anyone, at any time, has the same key.
    """
    hasher = hashlib.blake2b(digest_size=KEY_BYTES)
    hasher.update(struct.pack("<I", PROTOCOL_VERSION))
    hasher.update(bytes.fromhex(identity.fingerprint))
    hasher.update(request.spec.pack())
    hasher.update(struct.pack("<I", request.tokens.size))
    hasher.update(request.tokens.data)
    hasher.update(request.bounds.data)
    return hasher.digest()
