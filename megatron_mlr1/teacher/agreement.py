"""What all ranks do about the next step's targets: the same thing, always.

A rank whose targets are missing must not decide alone: the others would enter collectives that it
does not, or train on another objective. So each step's branch comes out of one MIN all-reduce over
what every rank knows, and an error of one rank is raised on all of them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
import torch.distributed as dist

from megatron_mlr1.errors import ConfigError, Mlr1Error, TeacherError
from megatron_mlr1.teacher.backend import TeacherUnavailable

POLL_S: Final = 0.05
"""Between two looks of the ranks at whether all are ready, while they wait together."""
WARN_S: Final = 10.0
"""A wait so long is worth a line in the log."""


class Branch(StrEnum):
    """The objective of one step."""

    KD = "kd"
    """Distillation: all ranks have their targets."""
    CE_ONLY = "ce_only"
    """Cross-entropy alone, on every rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What to do when targets are not there in time."""

    limit_s: float = 300.0
    """All ranks wait together so long, then raise TeacherUnavailable. Far below the collectives'
    own timeout (600 s by default), which other ranks may be waiting in."""
    ce_only_after_s: float | None = None
    """Seconds of waiting after which a step goes on without the teacher; None: `hold`, never."""
    ce_only_steps: int = 0
    """Steps of the whole run that may go on without the teacher; then it is `hold`."""

    def __post_init__(self) -> None:
        if self.limit_s <= 0:
            raise ConfigError(
                f"The longest wait for the teacher is {self.limit_s} s; it must be above 0. "
                "Choose how long a step may wait for its targets before the run stops."
            )
        if self.ce_only_after_s is None:
            return
        if not 0 <= self.ce_only_after_s < self.limit_s or self.ce_only_steps < 1:
            raise ConfigError(
                f"Steps without the teacher are to begin after {self.ce_only_after_s} s of "
                f"waiting, {self.ce_only_steps} of them; the wait must be between 0 and the "
                f"limit of {self.limit_s} s, and at least 1 step. Give both, or choose `hold`."
            )


class Agreement:
    """Decides each step's branch with all ranks of a group."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        policy: Policy,
        *,
        ce_only_used: int = 0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Take the ranks that decide together.

        Args:
            group: every rank that trains, over gloo (tensors of one byte on the CPU); None where
                one process trains alone.
            policy: the same on every rank.
            ce_only_used: steps that a resumed run has already done without the teacher, from its
                ledger; the same on every rank.
            report: told of long waits; give it on one rank.
        """
        self._group = group
        self._policy = policy
        self._ce_only_left = policy.ce_only_steps - ce_only_used
        self._report = report or (lambda line: None)

    @property
    def ce_only_left(self) -> int:
        """Steps that may still go on without the teacher."""
        return max(self._ce_only_left, 0)

    def decide(self, is_ready: Callable[[], bool]) -> Branch:
        """Agree on the branch of the step that begins; the same answer or error on every rank.

        Args:
            is_ready: whether this rank has all targets of the step; may raise Mlr1Error.

        Raises:
            TeacherUnavailable: the longest wait has passed, on all ranks.
            Mlr1Error: this rank cannot get its targets at all.
            TeacherError: another one cannot.
        """
        begin = time.monotonic()
        policy, warned = self._policy, False
        error: Mlr1Error | None = None
        patience = policy.ce_only_after_s if self._ce_only_left > 0 else None
        while True:
            waited_s = time.monotonic() - begin
            ready = False
            try:
                ready = is_ready()
            except Mlr1Error as mistake:
                error = mistake
            flags = self._reduce(
                ready,
                no_error=error is None,
                goes_on=waited_s < policy.limit_s,
                is_patient=patience is None or waited_s < patience,
            )
            all_ready, no_error, goes_on, is_patient = (bool(flag) for flag in flags)
            if not no_error:
                raise error or TeacherError(
                    "Another rank cannot get its targets, so no rank goes on; its own message "
                    "says why. Mend that and start the run again."
                )
            if all_ready:
                return Branch.KD
            if not is_patient:
                self._ce_only_left -= 1
                self._report(
                    f"no targets after {waited_s:.1f} s: this step goes on without the teacher, "
                    f"{self.ce_only_left} more may"
                )
                return Branch.CE_ONLY
            if not goes_on:
                raise _gave_up(policy.limit_s)
            if waited_s > WARN_S and not warned:
                warned = True
                self._report(f"all ranks have waited {waited_s:.0f} s for the teacher")
            time.sleep(POLL_S)

    def _reduce(
        self, is_ready: bool, *, no_error: bool, goes_on: bool, is_patient: bool
    ) -> torch.Tensor:
        """Give the MIN over all ranks of what each knows; all later choices rest on it alone."""
        flags = torch.tensor([is_ready, no_error, goes_on, is_patient], dtype=torch.uint8)
        if self._group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MIN, self._group)
        return flags


def _gave_up(limit_s: float) -> TeacherUnavailable:
    return TeacherUnavailable(
        f"No teacher gave the next step's targets for {limit_s:.0f} s, and the run may wait no "
        "longer. Start replicas, look at `tools/serve_teacher.py --status`, and start the run "
        "again."
    )
