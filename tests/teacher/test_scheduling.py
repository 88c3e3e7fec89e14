from random import Random

import pytest

from megatron_mlr1.teacher.scheduling import Breaker, HedgeBudget, Load, Pace, choose


def load_of(*, rate=None, outstanding=0):
    load = Load()
    if rate is not None:
        load.sent(rate)
        load.answered(rate, sent_at=0.0, now=1.0)
    if outstanding:
        load.sent(outstanding)
    return load


def test_a_rate_counts_the_time_in_which_the_replica_worked():
    load = Load()
    for _ in range(2):
        load.sent(100)
    load.answered(100, sent_at=0.0, now=1.0)
    # It waited in line until 1.0, then took a second too.
    load.answered(100, sent_at=0.0, now=2.0)
    assert load.tokens_per_s == pytest.approx(100)
    assert load.quantile(0.99) == 2.0
    assert load.num_outstanding == load.outstanding_tokens == 0


def test_two_answers_at_once_are_no_sign_of_speed():
    load = Load()
    for turn in range(50):
        for _ in range(2):
            load.sent(100)
        for _ in range(2):
            load.answered(100, sent_at=turn, now=turn + 2.0)
    assert load.tokens_per_s < 300


def test_of_two_replicas_the_one_that_would_answer_first_is_chosen():
    slow, fast = load_of(rate=10), load_of(rate=1000, outstanding=500)
    for seed in range(10):
        assert choose([slow, fast], 100, Random(seed)) == 1
    busy = load_of(rate=1000, outstanding=100_000)
    for seed in range(10):
        assert choose([slow, busy], 100, Random(seed)) == 0


def test_a_replica_without_a_measurement_counts_as_the_others_mean():
    new, known = load_of(), load_of(rate=100, outstanding=100)
    assert all(choose([new, known], 10, Random(seed)) == 0 for seed in range(10))


def test_load_spreads_over_equal_replicas():
    loads, random = [load_of(rate=100) for _ in range(8)], Random(0)
    for _ in range(800):
        loads[choose(loads, 10, random)].sent(10)
    outstanding = [load.num_outstanding for load in loads]
    assert max(outstanding) - min(outstanding) <= 5


def test_slack_follows_the_pace_of_the_training():
    pace = Pace()
    assert pace.slack(10, 0.0) == float("inf")
    for step in range(50):
        pace.took(step, step * 0.5)
    assert pace.slack(53, 24.5) == pytest.approx(2.0)
    assert pace.slack(53, 25.5) == pytest.approx(1.0)
    assert pace.slack(50, 26.0) < 0
    pace.took(40, 26.0)  # an older one does not turn the time back
    assert pace.slack(53, 26.0) == pytest.approx(0.5)


def test_the_pace_of_steps_that_take_several_targets_at_once_is_that_of_the_steps():
    pace = Pace()
    for step in range(20):
        for part in range(8):
            pace.took(8 * step + part, step * 4.0 + part * 1e-4)
    # The next step begins 4 s after the last one did, and takes 8 more.
    assert pace.slack(167, 76.0) == pytest.approx(4.0, rel=0.01)


def test_second_requests_are_a_share_of_the_first():
    budget = HedgeBudget(0.05)
    spent = sum(budget.spend() for _ in range(10))
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert 50 <= spent <= 52
    assert not any(HedgeBudget(0.0).spend() for _ in range(3))


def test_an_address_that_fails_is_tried_ever_more_rarely_and_at_least_every_few_seconds():
    breaker, now, waits = Breaker(), 0.0, []
    assert breaker.may_try(now)
    for _ in range(12):
        breaker.failed(now, Random(0))
        begin = now
        while not breaker.may_try(now):
            now += 0.01
        waits.append(now - begin)
    assert waits[0] < 0.15
    assert 3 < max(waits) < 6.5
    breaker.worked()
    breaker.failed(now, Random(0))
    assert breaker.may_try(now + 0.15)
