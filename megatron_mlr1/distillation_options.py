"""The flags of distillation: one argument group, and the frozen options that it becomes."""

import re
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Self, cast

from megatron_mlr1.errors import ConfigError

DIVERGENCES = ("forward", "reverse", "jsd")
"""From which side the distance of teacher and student is measured; the first is the default."""

SCHEDULES = ("constant", "linear", "wsd")
"""How the share of the divergence goes over the run; the first is the default."""

WITHOUT_TEACHER = ("hold", "ce_only")
"""What a step does whose targets do not come; the first is the default."""

BOS = ("as_is", "require", "inject")
"""What the teacher sees where a document begins; the first is the default."""

_FORM = re.compile(r"(hidden|hidden_int8)|hybrid:(\d+),(\d+)|top_k:(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationOptions:
    """What a run says of its teacher and of how it learns from it."""

    teacher: str | None = None
    """Who answers, as `teacher.addresses.FORMS_OF_ADDRESS` has it; None trains without."""

    keys: Path | None = None
    """Folder of keys with one student's, or that student's `.key_secret`."""

    divergence: Literal["forward", "reverse", "jsd"] = "forward"

    beta: float = 0.5
    """Share of the teacher in the mixture of the JSD."""

    temperature: float = 1.0

    alpha: float = 1.0
    """Share of the divergence in the loss, at its highest; the cross-entropy has the rest."""

    schedule: Literal["constant", "linear", "wsd"] = "constant"

    alpha_end: float = 0.0
    """Share at the end of the run, where the schedule changes it."""

    decay: float = 0.1
    """Part of the run, at its end, in which `wsd` comes down."""

    form: str = "hidden"
    """In which form the targets come: a form of `teacher.spec.FORMS`."""

    k: int = 0
    """Ids that a sparse form keeps."""

    m: int = 0
    """Draws of the form `hybrid`."""

    lookahead: int = 8
    """Micro-batches that are asked for before they are needed; at least those of one step."""

    buffer_gb: float = 2.0
    """Memory of each process that asks, in 10^9 bytes, for targets on their way."""

    without_teacher: Literal["hold", "ce_only"] = "hold"

    ce_only_after_s: float = 30.0
    """Seconds of waiting after which `ce_only` goes on without the teacher."""

    ce_only_budget: int = 0
    """Steps of the whole run that may go on without the teacher."""

    hold_limit_s: float = 300.0
    """Seconds that all ranks wait together before the run saves and ends."""

    bos: str = "as_is"

    audit_every: int = 1000
    """Every so many requests of a process one goes to two replicas; 0 for none."""

    new_teacher: bool = False
    """Go on from a checkpoint although its run learned from another teacher."""

    def __post_init__(self) -> None:
        if self.teacher is None:
            self._refuse_idle_flags()
        self._refuse_out_of_range()
        if self.form in ("hybrid", "top_k") and self.divergence != "forward":
            raise ConfigError(
                f"--kd-divergence {self.divergence} needs the teacher's whole distribution, and "
                f"--kd-form {self.form} brings a part of it, which serves the forward divergence "
                "alone. Choose --kd-form hidden, or --kd-divergence forward."
            )
        if self.without_teacher == "ce_only" and self.ce_only_budget < 1:
            raise ConfigError(
                "--kd-without-teacher ce_only changes the objective of steps whose targets do not "
                f"come, and --kd-ce-only-budget is {self.ce_only_budget}; it must be at least 1. "
                "Give the number of steps of the whole run that may do so, or choose hold."
            )

    def _refuse_idle_flags(self) -> None:
        for name, flag in _FLAGS.items():
            default = type(self).__dataclass_fields__[name].default
            if name != "new_teacher" and getattr(self, name) != default:
                raise ConfigError(
                    f"{flag} is given and --teacher is not, so it would do nothing. Give --teacher "
                    f"as well, or leave {flag} out."
                )

    def _refuse_out_of_range(self) -> None:
        limits = {
            "beta": (0.0 < self.beta < 1.0, "above 0 and below 1"),
            "temperature": (1e-3 <= self.temperature <= 1e3, "from 0.001 to 1000"),
            "alpha": (0.0 <= self.alpha <= 1.0, "from 0 to 1"),
            "alpha_end": (0.0 <= self.alpha_end <= 1.0, "from 0 to 1"),
            "decay": (0.0 < self.decay <= 1.0, "above 0 and at most 1"),
            "lookahead": (1 <= self.lookahead <= 1024, "from 1 to 1024"),
            "buffer_gb": (0.0 < self.buffer_gb < 1e6, "above 0"),
            "ce_only_after_s": (
                self.ce_only_after_s >= 0.0
                and (self.without_teacher == "hold" or self.ce_only_after_s < self.hold_limit_s),
                "at least 0 and below --kd-hold-limit",
            ),
            "ce_only_budget": (self.ce_only_budget >= 0, "at least 0"),
            "audit_every": (self.audit_every >= 0, "at least 0"),
            "hold_limit_s": (
                isfinite(self.hold_limit_s) and self.hold_limit_s > 0,
                "a positive number of seconds",
            ),
        }
        for name, (is_right, what) in limits.items():
            if not is_right:
                raise ConfigError(
                    f"{_FLAGS[name]} is {getattr(self, name)}; it must be {what}. Correct it."
                )

    @classmethod
    def from_namespace(cls, namespace: Namespace) -> Self:
        """Freeze what `add_distillation_arguments` parsed.

        Raises:
            ConfigError: a value out of its range, or flags that contradict each other.
        """
        form, k, m = _form(namespace.kd_form)
        return cls(
            teacher=namespace.teacher,
            keys=None if namespace.teacher_keys is None else Path(namespace.teacher_keys),
            divergence=namespace.kd_divergence,
            beta=namespace.kd_beta,
            temperature=namespace.kd_temperature,
            alpha=namespace.kd_alpha,
            schedule=namespace.kd_alpha_schedule,
            alpha_end=namespace.kd_alpha_end,
            decay=namespace.kd_alpha_decay,
            form=form,
            k=k,
            m=m,
            lookahead=namespace.kd_lookahead,
            buffer_gb=namespace.kd_buffer_gb,
            without_teacher=namespace.kd_without_teacher,
            ce_only_after_s=namespace.kd_ce_only_after,
            ce_only_budget=namespace.kd_ce_only_budget,
            hold_limit_s=namespace.kd_hold_limit,
            bos=namespace.kd_bos,
            audit_every=namespace.kd_audit_every,
            new_teacher=namespace.kd_new_teacher,
        )


_FLAGS = {
    "keys": "--teacher-keys",
    "divergence": "--kd-divergence",
    "beta": "--kd-beta",
    "temperature": "--kd-temperature",
    "alpha": "--kd-alpha",
    "schedule": "--kd-alpha-schedule",
    "alpha_end": "--kd-alpha-end",
    "decay": "--kd-alpha-decay",
    "form": "--kd-form",
    "lookahead": "--kd-lookahead",
    "buffer_gb": "--kd-buffer-gb",
    "without_teacher": "--kd-without-teacher",
    "ce_only_after_s": "--kd-ce-only-after",
    "ce_only_budget": "--kd-ce-only-budget",
    "hold_limit_s": "--kd-hold-limit",
    "bos": "--kd-bos",
    "audit_every": "--kd-audit-every",
}


def _form(text: str) -> tuple[str, int, int]:
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--kd-form is {text!r}; it must be hidden, hidden_int8, hybrid:K,M or top_k:K, K and "
            "M whole numbers: hybrid:64,64. Correct it."
        )
    if match[1]:
        return match[1], 0, 0
    return ("hybrid", int(match[2]), int(match[3])) if match[2] else ("top_k", int(match[4]), 0)


def add_distillation_arguments(parser: ArgumentParser) -> None:
    """Add the flags to `parser` as a group of their own."""
    default = DistillationOptions()
    group = parser.add_argument_group(
        "Distillation",
        "A teacher gives the targets; without --teacher a run trains on the corpora alone. "
        "docs/distillation.md explains them.",
    )
    add = cast(Any, group.add_argument)
    add(
        "--teacher",
        metavar="ADDRESS",
        help="tcp://HOST:PORT[,HOST:PORT...], the folder of a pool, store:DIR, tiered:DIR,+POOL, "
        "inprocess:HF_DIR, or null:VOCABULARY,WIDTH (noise, to measure speed)",
    )
    add(
        "--teacher-keys",
        metavar="DIR|FILE",
        help="this student's keys: the folder of tools/teacher_keys.py, or students/NAME.key_secret"
        " in it where it has several",
    )
    add(
        "--kd-divergence",
        choices=DIVERGENCES,
        default=default.divergence,
        help="KL(teacher, student) (forward, the default), KL(student, teacher), or a mixture",
    )
    add("--kd-beta", type=float, default=default.beta, help="of jsd: the teacher's share of it")
    add("--kd-temperature", type=float, default=default.temperature, metavar="T")
    add(
        "--kd-alpha",
        type=float,
        default=default.alpha,
        help="share of the divergence in the loss; the cross-entropy has the rest (default: 1)",
    )
    add(
        "--kd-alpha-schedule",
        choices=SCHEDULES,
        default=default.schedule,
        help="constant; linear from --kd-alpha to --kd-alpha-end over the run; wsd: up with the "
        "learning rate's warm-up, level, then down to --kd-alpha-end",
    )
    add("--kd-alpha-end", type=float, default=default.alpha_end, help="share at the end of the run")
    add(
        "--kd-alpha-decay",
        type=float,
        default=default.decay,
        metavar="PART",
        help="of wsd: the last part of the run, in which it comes down (default: 0.1)",
    )
    add(
        "--kd-form",
        default=default.form,
        metavar="FORM",
        help="of the targets: hidden (exact, the default), hidden_int8, hybrid:K,M or top_k:K",
    )
    _add_supply_arguments(add, default)


def _add_supply_arguments(add: Any, default: DistillationOptions) -> None:
    add(
        "--kd-lookahead",
        type=int,
        default=default.lookahead,
        metavar="D",
        help="micro-batches that are asked for before they are needed; at least those of one step "
        "(default: 8)",
    )
    add(
        "--kd-buffer-gb",
        type=float,
        default=default.buffer_gb,
        help="memory of each process that asks, for targets on their way (default: 2)",
    )
    add(
        "--kd-without-teacher",
        choices=WITHOUT_TEACHER,
        default=default.without_teacher,
        help="where targets do not come: all ranks wait (hold, the default), or go on by the "
        "cross-entropy alone",
    )
    add(
        "--kd-ce-only-after",
        type=float,
        default=default.ce_only_after_s,
        metavar="SECONDS",
        help="of ce_only: wait so long first (default: 30)",
    )
    add(
        "--kd-ce-only-budget",
        type=int,
        default=default.ce_only_budget,
        metavar="STEPS",
        help="of ce_only: so many steps of the whole run may do so",
    )
    add(
        "--kd-hold-limit",
        type=float,
        default=default.hold_limit_s,
        metavar="SECONDS",
        help="after waiting so long save and exit with code 75 (default: 300)",
    )
    add(
        "--kd-bos",
        choices=BOS,
        default=default.bos,
        help="what the teacher sees where a document begins: the tokens as they are (the default); "
        "an error without its BOS; a BOS put in",
    )
    add(
        "--kd-audit-every",
        type=int,
        default=default.audit_every,
        metavar="N",
        help="one request in N goes to two replicas, and who answers wrongly is asked no more "
        "(default: 1000; 1 checks all at twice the teacher's work; 0 checks none)",
    )
    add(
        "--kd-new-teacher",
        action="store_true",
        help="go on from a checkpoint whose run had another teacher, or one where this has none",
    )
