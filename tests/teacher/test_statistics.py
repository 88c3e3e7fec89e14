import time

from megatron_mlr1.teacher.statistics import Counters


def test_before_the_first_request_there_is_nothing_to_count():
    counters = Counters()
    assert counters.tokens_per_s() == 0
    assert counters.speed() is None
    assert counters.latency_ms(99) == 0


def test_speed_is_by_the_seconds_of_computing_and_the_rate_by_all_seconds():
    counters = Counters(started=time.monotonic() - 20)
    counters.computed(1000, 0.5)
    counters.computed(3000, 1.5)
    assert counters.speed() == 2000
    assert 190 < counters.tokens_per_s() < 201
    assert (counters.requests, counters.tokens) == (2, 4000)


def test_latencies_are_percentiles_of_the_newest():
    counters = Counters()
    for milliseconds in range(2000):
        counters.answered(milliseconds / 1000)
    assert abs(counters.latency_ms(50) - 1499.5) < 1
    assert counters.latency_ms(99) > 1985
