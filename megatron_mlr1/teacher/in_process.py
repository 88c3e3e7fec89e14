"""Teachers without a pool: one in this process, and one that is none."""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.teacher.backend import ImmediateTeacher, refuse_rows
from megatron_mlr1.teacher.engine import Engine
from megatron_mlr1.teacher.spec import (
    ArrayLayout,
    TargetRequest,
    Targets,
    TeacherIdentity,
    layout,
)

_log = logging.getLogger(__name__)


class InProcessTeacher(ImmediateTeacher):
    """A teacher on the device of this process: for one node, and for looking into things."""

    def __init__(self, engine: Engine) -> None:
        """Take a loaded teacher."""
        super().__init__(engine.identity)
        self._engine = engine

    def head(self, begin: int, end: int) -> NDArray[Any]:
        """Give rows [begin, end) of the head.

        Raises:
            TeacherError: they are outside of it.
        """
        refuse_rows(begin, end, self.identity)
        return self._engine.head_rows(begin, end)

    def _refuse(self, key: bytes, request: TargetRequest) -> None:
        super()._refuse(key, request)
        self._engine.refuse(request)

    def _answer(self, key: bytes, request: TargetRequest) -> Targets:
        return self._engine.targets(request, key)


class NullTeacher(ImmediateTeacher):
    """NOT A TEACHER: noise in a teacher's shape, to measure what distillation costs without one.

    Targets are the same for every sequence of one length, and are made once.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        """Choose the sizes of the teacher that is not there.

        Raises:
            ConfigError: a size is below 1.
        """
        if min(vocab_size, hidden_size) < 1:
            raise ConfigError(
                f"null:{vocab_size},{hidden_size} has a size below 1; write null:VOCABULARY,WIDTH."
            )
        super().__init__(
            TeacherIdentity(
                fingerprint="0" * 32,
                name="NULL-NOT-A-TEACHER",
                tokenizer_sha256="",
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                dtype="bfloat16",
                numerics="noise",
            )
        )
        self._made: dict[tuple[Any, int], Targets] = {}
        _log.warning(
            "THE TEACHER IS null: its targets are noise. This run measures speed and learns "
            "nothing that is worth keeping."
        )

    def head(self, begin: int, end: int) -> NDArray[Any]:
        """Give rows [begin, end) of noise.

        Raises:
            TeacherError: they are outside of the head.
        """
        refuse_rows(begin, end, self.identity)
        return _bf16_noise((end - begin, self.identity.hidden_size), seed=begin)

    def _answer(self, key: bytes, request: TargetRequest) -> Targets:
        shape = request.spec, request.rows
        if shape not in self._made:
            wanted = layout(request.spec, self.identity, request.rows)
            arrays = {array.name: self._noise(array) for array in wanted}
            self._made[shape] = Targets(request.spec, arrays)
        return self._made[shape]

    def _noise(self, array: ArrayLayout) -> NDArray[Any]:
        if array.name == "ids":
            row = np.arange(array.shape[1]) % self.identity.vocab_size
            return np.broadcast_to(row, array.shape).astype(array.dtype)
        if array.name == "weights":
            return np.full(array.shape, 0.5 / array.shape[1], array.dtype)
        if array.dtype == np.dtype("<u2"):
            return _bf16_noise(array.shape, seed=0)
        if array.dtype == np.dtype("i1"):
            return np.random.default_rng(0).integers(-127, 128, array.shape, "i1")
        return np.full(array.shape, 0.5 if array.name == "tail" else 0.01, array.dtype)


def _bf16_noise(shape: tuple[int, ...], seed: int) -> NDArray[np.uint16]:
    """Draw from N(0, 0.02) and cut to bfloat16, the upper half of a float32."""
    noise = np.random.default_rng(seed).standard_normal(shape, "<f4") * np.float32(0.02)
    return (noise.view("<u4") >> 16).astype("<u2")
