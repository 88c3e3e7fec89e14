import bisect
import tracemalloc

import numpy as np
import pytest

from megatron_mlr1.data.packing import MAX_PACK_LENGTH, Packs, pack
from megatron_mlr1.errors import ConfigError, DataError


def lengths_of(packs: Packs, lengths: np.ndarray) -> list[list[int]]:
    return [lengths[chats].tolist() for chats in packs.each()]


def log_normal(mean: float, sigma: float, number: int, limit: int) -> np.ndarray:
    drawn = np.exp(np.random.default_rng(0).normal(mean, sigma, number)).astype(np.int32)
    return drawn[(drawn > 0) & (drawn <= limit)]


def best_fit_decreasing(lengths: list[int], pack_length: int) -> list[int]:
    """The definition, chat by chat: the room left in each pack, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else pack_length
        bisect.insort(rooms, room - length)
    return rooms


@pytest.mark.parametrize("pack_length", [2, 37, 256])
@pytest.mark.parametrize("number", [1, 2, 500, 3000])
def test_packs_are_those_of_best_fit_decreasing(number: int, pack_length: int) -> None:
    lengths = np.random.default_rng(number).integers(1, pack_length + 1, number, np.int32)
    packs = pack(lengths, pack_length, seed=0)
    rooms = sorted(pack_length - sum(row) for row in lengths_of(packs, lengths))
    assert rooms == best_fit_decreasing(lengths.tolist(), pack_length)


@pytest.mark.parametrize(
    ("mean", "sigma", "pack_length"), [(6.2, 1.0, 4096), (7.2, 0.7, 4096), (8.8, 0.8, 32768)]
)
def test_real_lengths_fill_their_packs(mean: float, sigma: float, pack_length: int) -> None:
    lengths = log_normal(mean, sigma, 50_000, pack_length)
    packs = pack(lengths, pack_length, seed=0)
    assert lengths.sum() / (packs.sizes.size * pack_length) >= 0.98


def test_every_chat_is_in_one_pack_that_has_room_for_it() -> None:
    lengths = log_normal(5.0, 1.0, 10_000, 512)
    packs = pack(lengths, 512, seed=3)
    assert np.array_equal(np.sort(packs.chats), np.arange(lengths.size))
    assert packs.sizes.sum() == lengths.size
    assert max(map(sum, lengths_of(packs, lengths))) <= 512


def test_the_seed_alone_decides_the_order() -> None:
    lengths = log_normal(5.0, 1.0, 2_000, 512)
    first, again, other = (pack(lengths, 512, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.chats, again.chats)
    assert np.array_equal(first.sizes, again.sizes)
    assert not np.array_equal(first.chats, other.chats)


def test_neighbours_of_the_input_are_scattered() -> None:
    packs = pack(np.full(20_000, 100, np.int32), 500, seed=0)
    place = np.empty(20_000)
    place[packs.chats] = np.repeat(np.arange(packs.sizes.size), packs.sizes)
    correlation = np.corrcoef(place[:-1], place[1:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(20_000)
    longest_first = np.concatenate([np.full(1_000, 400), np.full(1_000, 300)]).astype(np.int32)
    of_each = [row[0] for row in lengths_of(pack(longest_first, 400, seed=0), longest_first)]
    assert 300 < np.mean(of_each[:200]) < 400


def test_a_chat_takes_sixteen_bytes_beside_a_table_of_rooms() -> None:
    lengths = log_normal(6.0, 0.8, 100_000, 4096)
    tracemalloc.start()
    try:
        pack(lengths, 4096, seed=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 16 * lengths.size + 128 * 4096


@pytest.mark.parametrize("pack_length", [0, 1, MAX_PACK_LENGTH + 1])
def test_a_pack_must_be_of_a_sensible_length(pack_length: int) -> None:
    with pytest.raises(ConfigError, match="--pack-length is"):
        pack(np.ones(3, np.int32), pack_length, seed=0)


def test_nothing_cannot_be_packed() -> None:
    with pytest.raises(DataError, match="0 chats"):
        pack(np.zeros(0, np.int32), 100, seed=0)
