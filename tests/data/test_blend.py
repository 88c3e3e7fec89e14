"""The blend gives every stream its part of every prefix, and counts in closed form."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_mlr1.data.blend import Phase, Schedule, blend
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.ops.sample_order import sample_order_reference

BOUND = 1.75
PAPER = [0.1066, 0.0693, 0.6375, 0.0503, 0.0636, 0.0503, 0.0225]


def streams_of(it, first, count):
    """The stream of each sample, by the op's definition."""
    ones = torch.ones(it.num_streams, dtype=torch.int64)
    tree = torch.from_numpy(it.tree)
    return sample_order_reference(tree, 0 * ones, ones, ones, it.root, first, count)[0].numpy()


def lognormal(num_streams):
    return np.random.default_rng(num_streams).lognormal(0, 1.2, num_streams).tolist()


MIXTURES = {
    "2": [0.3, 0.7],
    "paper": PAPER,
    "14": lognormal(14),
    "50": lognormal(50),
    "200": lognormal(200),
    "equal": [1.0] * 200,
    "a half and shards": [199.0, *[1.0] * 199],
    "most and shards": [0.9, *[0.1 / 64] * 64],
    "halves": [2.0**-k for k in range(40)],
    "fibonacci": [1.618034**-k for k in range(40)],
    "thirds": [2 / 3 * 3.0**-k for k in range(25)],
    "nearly one": [1.0, 1e-4, 1e-5, 0.0, 1e-300],
}


def deviations(weights, num_samples):
    """How far the counts of each prefix are from its parts: the largest of all streams."""
    it = blend(weights)
    drawn = streams_of(it, 0, num_samples)
    total = sum(map(Fraction, weights))
    worst = 0.0
    position = np.arange(1, num_samples + 1)
    for stream, weight in enumerate(weights):
        mine = np.cumsum(drawn == stream)
        worst = max(worst, float(np.abs(mine - position * float(Fraction(weight) / total)).max()))
    return worst


@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES.keys())
def test_every_prefix_has_the_parts_of_the_weights_within_the_bound(weights):
    # A rounding of doubles: positions below 2**17 times shares of 53 bits.
    assert deviations(weights, 100_000) < BOUND + 1e-9


def test_no_random_mixture_breaks_the_bound():
    random = np.random.default_rng(0)
    for _ in range(100):
        weights = random.lognormal(0, random.uniform(0, 5), random.integers(2, 30))
        assert deviations(weights.tolist(), 2000) < BOUND + 1e-9


@pytest.mark.parametrize("num_samples", [10**9, 2**40, 2**48])
@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES.keys())
def test_a_long_run_drifts_nowhere(weights, num_samples):
    total = sum(map(Fraction, weights))
    counts = blend(weights).counts(num_samples).tolist()
    assert sum(counts) == num_samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - num_samples * Fraction(weight) / total) < Fraction(2)


@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES.keys())
def test_counts_are_what_a_count_of_the_samples_gives(weights):
    it = blend(weights)
    drawn = streams_of(it, 0, 3000)
    for end in (0, 1, 2, 3, 500, 2999, 3000):
        assert it.counts(end).tolist() == np.bincount(drawn[:end], minlength=len(weights)).tolist()
    begin = 10**12
    later = np.bincount(streams_of(it, begin, 3000), minlength=len(weights))
    assert (it.counts(begin + 3000) - it.counts(begin)).tolist() == later.tolist()


def test_weights_are_relative_and_a_stream_without_one_is_never_drawn():
    one, other = blend([0.25, 0.0, 0.5]), blend([2.0, 0.0, 4.0])
    assert one.root == other.root
    assert one.tree.tolist() == other.tree.tolist()
    assert one.counts(300).tolist() == [100, 0, 200]


def test_a_tiny_weight_is_drawn_in_its_time():
    it = blend([1.0, 1e-9])
    assert it.counts(499_999_990)[1] == 0
    assert it.counts(500_000_010)[1] == 1
    assert it.counts(10**12)[1] == 1000


def test_a_stream_alone_is_always_drawn():
    assert blend([0.0, 3.0]).counts(7).tolist() == [0, 7]


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.1], [float("nan")], [float("inf")]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ConfigError, match="The weights of the mixture are"):
        blend(weights)


def test_phases_go_on_counting():
    weights, later, last = [1.0, 1.0, 0.0], (0.0, 1.0, 3.0), (1.0, 0.0, 0.0)
    phases = (Phase(first_sample=10, weights=later), Phase(first_sample=18, weights=last))
    schedule = Schedule(weights, phases)
    assert schedule.counts(0).tolist() == [0, 0, 0]
    assert schedule.counts(10).tolist() == [5, 5, 0]
    assert schedule.counts(18).tolist() == [5, 7, 6]
    assert schedule.counts(100).tolist() == [87, 7, 6]
    assert [schedule.phase_of(sample) for sample in (0, 9, 10, 17, 18, 10**12)] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize("first", [0, -5, 10, 9])
def test_phases_out_of_order_are_refused(first):
    phases = (Phase(first_sample=10, weights=(1.0,)), Phase(first_sample=first, weights=(1.0,)))
    with pytest.raises(ConfigError, match=f"begins at sample {first}, after one"):
        Schedule([1.0], phases)


def test_a_phase_needs_a_weight_for_each_stream():
    with pytest.raises(ConfigError, match="from sample 4 has 1 weights for 2 streams"):
        Schedule([1.0, 2.0], [Phase(first_sample=4, weights=(1.0,))])
