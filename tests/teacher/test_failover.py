"""What replicas suffer, and what the training notices of it: nothing, or one clear error."""

import gc
import resource
import signal
import time

import numpy as np
import pytest

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.audit import bits
from megatron_mlr1.teacher.backend import TeacherUnavailable
from megatron_mlr1.teacher.client import ClientOptions, ServedTeacher
from megatron_mlr1.teacher.dispatch import DispatchOptions
from megatron_mlr1.teacher.pool import AddressPool, FolderPool
from megatron_mlr1.teacher.replicas import Access
from tests.support.teacher_pool import (
    client_of,
    learn,
    pool_of,
    reference,
    sequence,
    shared_nursery,
    wait_until,
)
from tests.support.teacher_proxy import proxy_before
from tests.support.teachers import PATIENCE_S

STEPS = 120
DELAY_S = 0.02
STEP_S = 0.015
SLOWEST_START_S = 60.0
SLOWEST_S = 20.0
"""Longest wait of a step on a busy machine; an idle one takes 2 s to notice silence."""


@pytest.fixture
def pool(tmp_path):
    with pool_of(shared_nursery(), tmp_path / "pool", 3, delay_s=DELAY_S) as pool:
        yield pool


def at(events):
    """What happens before which step."""
    return lambda step: events.get(step, lambda: None)()


def all_connected(client, count):
    wait_until(lambda: client.statistics()["replicas"] == count)


def test_a_killed_replica_changes_nothing_and_is_noticed_at_once(pool, caplog):
    with client_of(pool) as client:
        all_connected(client, 3)
        disturb = at({30: lambda: pool.kill("r0"), 80: lambda: pool.kill("r1")})
        hashes = learn(client, range(STEPS), disturb=disturb, step_s=STEP_S)
        assert hashes == reference(STEPS)
        assert client.statistics()["failovers"] > 0
    for name in ("r0", "r1"):
        assert f"{name} is gone: the connection broke" in caplog.text


def test_a_stopped_replica_is_noticed_by_its_silence(pool, caplog):
    waits = []
    # No second requests: it is the silence that must be noticed.
    with client_of(pool, dispatch=DispatchOptions(hedge_share=0)) as client:
        all_connected(client, 3)
        disturb = at({40: lambda: pool.signal("r1", signal.SIGSTOP)})
        hashes = learn(client, range(STEPS), disturb=disturb, waits=waits)
        assert hashes == reference(STEPS)
        assert client.statistics()["failovers"] > 0
    assert "r1 is gone: no sign of it for 2 s" in caplog.text
    assert max(waits) < SLOWEST_S


def test_a_late_answer_is_asked_for_twice_within_the_budget(pool):
    waits = []
    with client_of(pool) as client:
        all_connected(client, 3)
        disturb = at({60: lambda: pool.signal("r1", signal.SIGSTOP)})
        hashes = learn(client, range(STEPS), disturb=disturb, waits=waits, step_s=STEP_S)
        assert hashes == reference(STEPS)
        assert 0 < client.statistics()["hedges"] <= 2 + 0.05 * STEPS
        assert max(waits) < SLOWEST_S


def test_a_stopped_replica_that_goes_on_is_taken_back(pool):
    with client_of(pool) as client:
        all_connected(client, 3)
        pool.signal("r2", signal.SIGSTOP)
        assert learn(client, range(20)) == reference(STEPS)[:20]
        all_connected(client, 2)
        pool.signal("r2", signal.SIGCONT)
        all_connected(client, 3)
        assert learn(client, range(STEPS)) == reference(STEPS)


def test_all_replicas_gone_and_back_lose_nothing(pool):
    def kill_all():
        for name in list(pool.processes):
            pool.kill(name)

    def start_again():
        kill_all()
        time.sleep(0.5)
        for _ in range(3):
            pool.start(delay_s=DELAY_S)

    with client_of(pool) as client:
        all_connected(client, 3)
        disturb = at({20: start_again, 70: start_again})
        assert learn(client, range(STEPS), disturb=disturb) == reference(STEPS)
        assert client.statistics().get("quarantined", 0) == 0


def test_a_rolling_restart_loses_no_request_at_all(pool):
    def replace(name):
        pool.start(delay_s=DELAY_S)
        pool.signal(name, signal.SIGTERM)

    with client_of(pool) as client:
        all_connected(client, 3)
        disturb = at({step: lambda i=i: replace(f"r{i}") for i, step in enumerate((20, 50, 80))})
        assert learn(client, range(STEPS), disturb=disturb, step_s=0.03) == reference(STEPS)
        figures = client.statistics()
        assert figures.get("failovers", 0) == figures.get("lost", 0) == 0
        all_connected(client, 3)


def test_a_replica_that_joins_takes_part(tmp_path):
    with (
        pool_of(shared_nursery(), tmp_path / "pool", 1, delay_s=DELAY_S) as pool,
        client_of(pool) as client,
    ):
        assert learn(client, range(20)) == reference(STEPS)[:20]
        pool.start(delay_s=DELAY_S)
        all_connected(client, 2)
        assert learn(client, range(STEPS)) == reference(STEPS)
        wait_until(lambda: client.statistics()["r1/tokens_per_s"] > 0)


def test_a_replica_with_damaged_weights_is_ejected_and_teaches_nothing(pool):
    bad = pool.start(damage=1e-3, delay_s=DELAY_S)
    with client_of(pool, audit_every=1) as client:
        all_connected(client, 4)
        assert learn(client, range(STEPS)) == reference(STEPS)
        figures = client.statistics()
        assert figures["ejected"] == 1
        assert figures["audit_mismatches"] >= 1
        assert f"{bad}/in_flight" not in figures


def test_a_replica_that_begins_to_lie_is_ejected_though_only_two_others_are_there(tmp_path):
    with pool_of(shared_nursery(), tmp_path / "pool", 2, delay_s=DELAY_S) as pool:
        pool.start(damage=1e-3, damage_after=10, delay_s=DELAY_S)
        with client_of(pool, audit_every=1) as client:
            all_connected(client, 3)
            assert learn(client, range(STEPS)) == reference(STEPS)
            assert client.statistics()["ejected"] == 1


def test_of_two_replicas_that_disagree_nobody_knows_which_is_wrong(tmp_path):
    with pool_of(shared_nursery(), tmp_path / "pool", 1) as pool:
        pool.start(damage=1e-3)
        with client_of(pool, audit_every=1) as client:
            all_connected(client, 2)
            with pytest.raises(TeacherError, match="r0 and r1 give different targets"):
                learn(client, range(10))


def test_a_replica_whose_head_is_another_is_ejected_before_a_student_learns_of_it(tmp_path):
    with pool_of(shared_nursery(), tmp_path / "pool", 1, damage_head=True) as pool:
        pool.start()
        pool.start()
        with client_of(pool) as client:
            all_connected(client, 3)
            whole = client.head(0, client.identity.vocab_size)
            assert client.statistics()["ejected"] == 1
        pool.kill("r0")
        with client_of(pool) as client:
            assert np.array_equal(client.head(0, client.identity.vocab_size), whole)
            assert client.statistics()["ejected"] == 0


def test_of_two_heads_that_differ_nobody_knows_which_is_wrong(tmp_path):
    with pool_of(shared_nursery(), tmp_path / "pool", 1, damage_head=True) as pool:
        pool.start()
        with client_of(pool) as client:
            all_connected(client, 2)
            with pytest.raises(TeacherError, match="r0 and r1 give different rows"):
                client.head(0, client.identity.vocab_size)
            assert len(client.head(1, 5)) == 4, "these are alike"


def test_a_replica_whose_states_are_no_numbers_is_reported(tmp_path):
    with (
        pool_of(shared_nursery(), tmp_path / "pool", 2, damage=float("nan")) as pool,
        client_of(pool) as client,
        pytest.raises(TeacherError, match="NaN"),
    ):
        learn(client, range(10))


def test_a_request_that_kills_two_replicas_is_not_given_to_a_third(tmp_path):
    poison = int(sequence(5).tokens[0])
    with (
        pool_of(shared_nursery(), tmp_path / "pool", 4, poison=poison) as pool,
        client_of(pool, audit_every=0) as client,
    ):
        all_connected(client, 4)
        ticket = client.submit(sequence(5), 0)
        with pytest.raises(TeacherError, match="died or failed at it"):
            client.fetch(ticket, PATIENCE_S)
        all_connected(client, 2)
        harmless = [seed for seed in range(20) if sequence(seed).tokens[0] != poison]
        expected = tuple(reference(STEPS)[seed] for seed in harmless)
        assert learn(client, harmless) == expected


def test_nobody_left_is_told_to_whoever_waits(tmp_path):
    with pool_of(shared_nursery(), tmp_path / "pool", 1) as pool, client_of(pool) as client:
        assert learn(client, range(3)) == reference(STEPS)[:3]
        pool.kill("r0")
        ticket = client.submit(sequence(4), 4)
        with pytest.raises(TeacherUnavailable):
            client.fetch(ticket, 0.5)
        pool.start()
        assert bits(client.fetch(ticket, PATIENCE_S)) == reference(STEPS)[4]


def test_lost_delayed_and_repeated_messages_change_nothing(pool):
    endpoints = [lease.endpoint for lease in FolderPool(pool.folder).leases()]
    with (
        proxy_before(endpoints[0], 1, losses=2) as one,
        proxy_before(endpoints[1], 2, losses=2) as other,
    ):
        access = Access(pool=AddressPool((one.endpoint, other.endpoint)))
        client = ServedTeacher(access, ClientOptions(start_timeout_s=SLOWEST_START_S))
        try:
            assert learn(client, range(STEPS)) == reference(STEPS)
            figures = client.statistics()
        finally:
            client.close()
    for proxy in (one, other):
        assert min(proxy.counts[name] for name in ("lost", "delayed", "repeated")) > 0
    assert figures["duplicates"] > 0
    assert figures.get("lost", 0) + figures.get("hedges", 0) > 0
    assert figures.get("quarantined", 0) == 0


@pytest.mark.slow
def test_replicas_killed_every_second_for_a_minute_change_nothing_and_leak_nothing(pool):
    steps, killed = 1500, []

    def disturb(step):
        if step % 30 == 29:
            name = sorted(pool.processes)[step % len(pool.processes)]
            pool.kill(name)
            killed.append(pool.start(delay_s=DELAY_S))

    seeds = [step % STEPS for step in range(steps)]
    with client_of(pool) as client:
        all_connected(client, 3)
        learn(client, range(STEPS))
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        hashes = learn(client, seeds, disturb=disturb, step_s=0.02)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert hashes == tuple(reference(STEPS)[seed] for seed in seeds)
        assert len(killed) == steps // 30
        assert after - before < 20_000  # KiB
        wait_until(lambda: client.statistics()["in_flight_bytes"] == 0)
