"""Targets of every form that any teacher could give, and a teacher without a model that gives them.

The teacher is a real one of one word of memory: its states are a table, looked up by token.
"""

import numpy as np

from megatron_mlr1.teacher.backend import ImmediateTeacher, TeacherUnavailable, Ticket, refuse_rows
from megatron_mlr1.teacher.spec import (
    TargetRequest,
    Targets,
    TargetSpec,
    TeacherIdentity,
    layout,
)

FORMS = (
    TargetSpec(),
    TargetSpec(form="hidden_int8", seed=3),
    TargetSpec(form="top_k", k=4),
    TargetSpec(form="hybrid", k=5, m=4, seed=9),
)


def identity_of(vocab_size=128_256, *, seed=0, dtype="bfloat16"):
    return TeacherIdentity(
        fingerprint=f"{seed:032x}",
        name=f"table-{seed}",
        tokenizer_sha256="ab" * 32,
        vocab_size=vocab_size,
        hidden_size=16,
        dtype=dtype,
        numerics="table",
    )


def random_request(seed, spec=None, length=24, vocab_size=128_256):
    tokens = np.random.default_rng(seed).integers(0, vocab_size, length).astype("<i4")
    bounds = np.array([0, length // 3, length], "<i4")
    return TargetRequest(tokens, bounds, spec or TargetSpec())


class TableTeacher(ImmediateTeacher):
    """Looks its answers up; has no replicas to lose, but can be told to have none."""

    def __init__(self, identity=None):
        super().__init__(identity or identity_of())
        random = np.random.default_rng(int(self.identity.fingerprint, 16))
        self.table = random.integers(0, 256, (4096, 64), np.uint8)
        self.is_there = True
        self.is_closed = False

    def ready(self, ticket: Ticket):
        return self.is_there and super().ready(ticket)

    def fetch(self, ticket, timeout_s):
        if not self.is_there:
            raise TeacherUnavailable("the table is not there. Wait.")
        return super().fetch(ticket, timeout_s)

    def head(self, begin, end):
        refuse_rows(begin, end, self.identity)
        rows = np.arange(begin * 16, end * 16) % 0x7F00
        return rows.astype(self.identity.state_dtype).reshape(-1, 16)

    def close(self):
        self.is_closed = True

    def _answer(self, key, request: TargetRequest):
        random = np.random.default_rng(self.table[request.tokens % 4096].ravel())
        arrays = {}
        for array in layout(request.spec, self.identity, request.rows):
            if array.name == "ids":
                made = random.integers(0, self.identity.vocab_size, array.shape)
            elif array.dtype == np.dtype("i1"):
                made = random.integers(-127, 128, array.shape)
            elif array.dtype == np.dtype("<u2"):
                made = random.integers(0, 0x7F80, array.shape)
            else:
                made = random.random(array.shape)
            arrays[array.name] = made.astype(array.dtype)
        return Targets(request.spec, arrays)
