"""What a replica needs of a teacher, whatever computes it. No torch here."""

from typing import Any, Protocol

from numpy.typing import NDArray

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.spec import TargetRequest, Targets, TeacherIdentity
from megatron_mlr1.teacher.wire import Code


class RequestError(TeacherError):
    """A request that this teacher cannot answer, now or ever; `code` goes over the wire."""

    def __init__(self, code: Code, text: str) -> None:
        """Say why in words, and by the code that the student's program reads."""
        super().__init__(text)
        self.code = code

    def __reduce__(self) -> tuple[type["RequestError"], tuple[Code, str]]:
        """Go from process to process with its code."""
        return type(self), (self.code, str(self))


class Engine(Protocol):
    """A teacher; `model.TeacherModel` is one, and another can take its place."""

    identity: TeacherIdentity
    max_tokens: int
    """Tokens of the longest request."""

    def refuse(self, request: TargetRequest) -> None:
        """Raise `RequestError` where the request can never be answered; computes nothing."""

    def targets(self, request: TargetRequest, key: bytes) -> Targets:
        """Compute the targets of one request; the same bits for the same request.

        Args:
            request: one sequence that `refuse` lets pass.
            key: its content key, which with the spec's seed decides the draws of a sparse form.

        Raises:
            RequestError: the states hold NaN or Inf.
            RuntimeError: the device failed.
        """

    def head_rows(self, begin: int, end: int) -> NDArray[Any]:
        """Give rows [begin, end) of the head, (end - begin, d) of `identity.state_dtype`."""
