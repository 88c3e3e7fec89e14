"""The order of samples: exact epochs, and a pure function of seed and number."""

import numpy as np
import pytest

from megatron_mlr1.data.sampler import Phase, SampleOrder, Stream
from megatron_mlr1.errors import ConfigError, DataError

SIZES = {"web": 1000, "wiki": 37, "code": 211, "rare": 1}
WEIGHTS = {"web": 0.6, "wiki": 0.2, "code": 0.2, "rare": 0.001}


def streams(names=tuple(SIZES), **weights):
    return [
        Stream(name=name, key=f"{name}_document", weight=weight, num_items=SIZES[name])
        for name in names
        for weight in [(WEIGHTS | weights)[name]]
    ]


def rows(places):
    return np.stack((places.stream, places.epoch, places.item), axis=1)


PHASES = (
    Phase(first_sample=3000, weights=(0.0, 1.0, 1.0, 0.0)),
    Phase(first_sample=3100, weights=(1.0, 0.0, 1.0, 0.1)),
    Phase(first_sample=7001, weights=(0.5, 0.5, 0.0, 0.0)),
)


@pytest.mark.parametrize("phases", [(), PHASES], ids=["one blend", "four phases"])
def test_each_epoch_of_a_stream_has_each_item_once(phases):
    order = SampleOrder(streams(), 1234, phases)
    drawn = rows(order.places(0, 10_000))
    for number, stream in enumerate(order.streams):
        mine = drawn[drawn[:, 0] == number]
        # Counted without a gap, from the first to the last phase.
        assert np.array_equal(mine[:, 1], np.arange(len(mine)) // stream.num_items)
        for epoch in range(len(mine) // stream.num_items):
            items = mine[mine[:, 1] == epoch, 2]
            assert np.array_equal(np.sort(items), np.arange(stream.num_items))
        last = mine[mine[:, 1] == len(mine) // stream.num_items, 2]
        assert np.unique(last).size == last.size


@pytest.mark.parametrize("phases", [(), PHASES], ids=["one blend", "four phases"])
def test_any_way_to_ask_gives_the_same_order(phases):
    order = SampleOrder(streams(), 1234, phases)
    whole = rows(order.places(0, 8000))
    assert np.array_equal(whole[3:7005], rows(order.places(3, 7002)))
    pieces = [rows(order.places(first, 16)) for first in range(0, 8000, 16)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert rows(order.places(3000, 0)).shape == (0, 3)
    assert np.array_equal(
        whole[6999:7003], rows(SampleOrder(streams(), 1234, phases).places(6999, 4))
    )


@pytest.mark.parametrize("phases", [(), PHASES], ids=["one blend", "four phases"])
def test_counts_are_those_of_the_samples(phases):
    order = SampleOrder(streams(), 1234, phases)
    stream = order.places(0, 8000).stream
    for consumed in (0, 1, 2999, 3000, 3001, 3100, 7000, 7001, 8000):
        counted = np.bincount(stream[:consumed], minlength=4)
        assert order.counts(consumed).tolist() == counted.tolist()


def test_seeds_give_other_items_and_the_same_blend():
    one, other = (SampleOrder(streams(), seed).places(0, 5000) for seed in (1, 2))
    assert np.array_equal(one.stream, other.stream)
    web = one.stream == 0
    assert 0 < (one.item[web] == other.item[web]).sum() < 20


def test_a_corpus_keeps_its_order_when_others_come_or_go():
    alone = SampleOrder(streams(["code"]), 1234).places(0, 400)
    among = SampleOrder(streams(), 1234).places(0, 4000)
    mine = among.stream == 2
    assert np.array_equal(among.item[mine][:400], alone.item)


def test_streams_of_the_same_size_and_another_key_are_shuffled_apart():
    twins = [Stream(name="c", key=key, weight=1.0, num_items=5000) for key in ("c/00", "c/01")]
    places = SampleOrder(twins, 1234).places(0, 10_000)
    one, other = (places.item[places.stream == number] for number in (0, 1))
    assert (one == other).sum() < 8
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(5000)


PINNED = [[1, 0, 0, 2, 2, 1, 2, 1], [16, 1, 1, 2, 2, 16, 2, 16], [15, 64, 795, 15, 69, 9, 128, 36]]


def test_the_order_of_a_seed_never_changes():
    """Written down once: a run that goes on must go on in its order."""
    places = SampleOrder(streams(), 1234, PHASES).places(2996, 8)
    assert places.stream.tolist() == PINNED[0]
    assert places.epoch.tolist() == PINNED[1]
    assert places.item.tolist() == PINNED[2]


def test_a_billion_samples_are_reached_at_once():
    many = [
        Stream(name=f"c{i}", key=f"c{i}", weight=1.0 + i, num_items=20_000_000) for i in range(50)
    ]
    order = SampleOrder(many, 1234)
    places = order.places(10**9, 1000)
    assert order.counts(10**9).sum() == 10**9
    number = places.epoch * 20_000_000
    assert (number <= order.counts(10**9 + 1000)[places.stream]).all()
    assert (number + 20_000_000 > order.counts(10**9)[places.stream]).all()


@pytest.mark.parametrize("num_items", [0, -1, 2**40 + 1])
def test_a_stream_without_a_sample_or_with_too_many_is_refused(num_items):
    with pytest.raises(DataError, match=f"a/00 of wiki has {num_items} samples; it must have 1 to"):
        Stream(name="wiki", key="a/00", weight=1.0, num_items=num_items)


def test_wrong_weights_are_refused():
    with pytest.raises(ConfigError, match="weights of the mixture"):
        SampleOrder(streams(web=-1.0), 1234)
    with pytest.raises(ConfigError, match="1 weights for 4 streams"):
        SampleOrder(streams(), 1234, [Phase(first_sample=5, weights=(1.0,))])
