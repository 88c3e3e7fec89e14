import time

import pytest
import torch.distributed as dist

from megatron_mlr1.errors import ConfigError, TeacherError
from megatron_mlr1.teacher.agreement import Agreement, Branch, Policy
from megatron_mlr1.teacher.backend import TeacherUnavailable
from tests.support.world import run_in_world

HOLD = Policy(limit_s=120)


def after(seconds):
    """Ready when so much time has passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def never():
    return False


def broken():
    raise TeacherError("my teacher is ill")


def outcome(agreement, is_ready):
    try:
        return agreement.decide(is_ready).value
    except TeacherError as error:
        return f"{type(error).__name__}: {error}"


def ranks_decide():
    """Every case in one world; what each rank decided."""
    rank, group = dist.get_rank(), dist.group.WORLD
    answers = {}
    # Only rank 1 has its targets, and later.
    hold = Agreement(group, HOLD)
    answers["hold"] = outcome(hold, after(0.3) if rank == 0 else after(0))
    # Rank 1 alone lacks targets; two steps may go on without them, then it is hold.
    policy = Policy(limit_s=1.0, ce_only_after_s=0.2, ce_only_steps=2)
    few = Agreement(group, policy)
    lacking = never if rank == 1 else after(0)
    answers["ce_only"] = [outcome(few, lacking) for _ in range(3)]
    answers["left"] = few.ce_only_left
    # Clocks of the ranks differ: the most impatient one decides for all.
    impatient = Policy(limit_s=90.0, ce_only_after_s=0.2 if rank == 0 else 80.0, ce_only_steps=1)
    begin = time.monotonic()
    answers["impatient"] = outcome(Agreement(group, impatient), never)
    answers["at once"] = time.monotonic() - begin < 60
    answers["error"] = outcome(Agreement(group, HOLD), broken if rank == 1 else after(0))
    return answers


def test_all_ranks_take_the_same_branch(tmp_path):
    one, other = run_in_world(2, ranks_decide, tmp_path)
    assert "my teacher is ill" in other.pop("error")
    assert "Another rank" in one.pop("error")
    assert one == other
    assert one["hold"] == "kd"
    assert one["ce_only"][:2] == ["ce_only", "ce_only"]
    assert one["ce_only"][2].startswith("TeacherUnavailable")
    assert one["left"] == 0
    assert one["impatient"] == "ce_only"
    assert one["at once"]


def test_one_process_decides_alone_and_says_what_it_waits_for():
    said = []
    policy = Policy(limit_s=5, ce_only_after_s=0.1, ce_only_steps=3)
    agreement = Agreement(None, policy, ce_only_used=1, report=said.append)
    assert agreement.decide(after(0)) is Branch.KD
    assert agreement.decide(never) is Branch.CE_ONLY
    assert agreement.ce_only_left == 1
    assert "1 more" in said[0]


def test_a_resumed_run_does_not_get_its_budget_back():
    agreement = Agreement(
        None, Policy(limit_s=0.3, ce_only_after_s=0.1, ce_only_steps=3), ce_only_used=3
    )
    with pytest.raises(TeacherUnavailable, match="may wait no longer") as caught:
        agreement.decide(never)
    assert caught.value.exit_code == 75


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit_s": 0},
        {"ce_only_after_s": 400.0, "ce_only_steps": 1},
        {"ce_only_after_s": 1.0},
    ],
    ids=str,
)
def test_a_policy_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError):
        Policy(**wrong)
