"""The flags of distillation: what they become, and what is refused."""

from pathlib import Path

import pytest

from megatron_mlr1.distillation_options import DistillationOptions
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.options import split_words


def parsed(words: str) -> DistillationOptions:
    return split_words(words.split())[0].distillation


def test_flags_become_frozen_options() -> None:
    words = (
        "--teacher tcp://a:1,b:2 --teacher-keys keys --kd-divergence jsd --kd-beta 0.3 "
        "--kd-temperature 2 --kd-alpha 0.9 --kd-alpha-schedule wsd --kd-alpha-end 0.1 "
        "--kd-alpha-decay 0.2 --kd-form hidden_int8 --kd-lookahead 4 --kd-buffer-gb 1.5 "
        "--kd-without-teacher ce_only --kd-ce-only-after 5 --kd-ce-only-budget 7 "
        "--kd-hold-limit 60 --kd-bos inject --kd-audit-every 5 --kd-new-teacher"
    )
    assert parsed(words) == DistillationOptions(
        teacher="tcp://a:1,b:2",
        keys=Path("keys"),
        divergence="jsd",
        beta=0.3,
        temperature=2.0,
        alpha=0.9,
        schedule="wsd",
        alpha_end=0.1,
        decay=0.2,
        form="hidden_int8",
        lookahead=4,
        buffer_gb=1.5,
        without_teacher="ce_only",
        ce_only_after_s=5.0,
        ce_only_budget=7,
        hold_limit_s=60.0,
        bos="inject",
        audit_every=5,
        new_teacher=True,
    )


def test_the_default_is_the_papers_objective_and_no_teacher() -> None:
    found = parsed("")
    assert found == DistillationOptions()
    assert found.teacher is None
    assert (found.divergence, found.temperature, found.alpha, found.form) == (
        "forward",
        1.0,
        1.0,
        "hidden",
    )


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("hidden", ("hidden", 0, 0)),
        ("hybrid:64,32", ("hybrid", 64, 32)),
        ("top_k:8", ("top_k", 8, 0)),
    ],
)
def test_a_form_brings_its_numbers(word: str, form: tuple[str, int, int]) -> None:
    found = parsed(f"--teacher t --kd-form {word}")
    assert (found.form, found.k, found.m) == form


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kd-alpha 0.5", "--kd-alpha is given and --teacher is not"),
        ("--teacher-keys keys", "--teacher-keys is given and --teacher is not"),
        ("--kd-form top_k:4", "--kd-form is given and --teacher is not"),
        ("--teacher t --kd-alpha 1.5", "--kd-alpha is 1.5; it must be from 0 to 1"),
        ("--teacher t --kd-alpha nan", "--kd-alpha is nan"),
        ("--teacher t --kd-temperature 0", "--kd-temperature is 0.0"),
        ("--teacher t --kd-beta 1", "--kd-beta is 1.0"),
        ("--teacher t --kd-lookahead 0", "--kd-lookahead is 0"),
        ("--teacher t --kd-hold-limit inf", "--kd-hold-limit is inf"),
        ("--teacher t --kd-form top_k", "it must be hidden, hidden_int8, hybrid:K,M or top_k:K"),
        ("--teacher t --kd-form hybrid:4", "it must be hidden, hidden_int8"),
        ("--teacher t --kd-form top_k:4 --kd-divergence reverse", "Choose --kd-form hidden"),
        ("--teacher t --kd-without-teacher ce_only", "--kd-ce-only-budget is 0"),
        (
            "--teacher t --kd-without-teacher ce_only --kd-ce-only-budget 1 --kd-hold-limit 10",
            "below --kd-hold-limit",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(words)
