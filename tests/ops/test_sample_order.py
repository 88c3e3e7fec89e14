"""The order of samples against its formulas in plain integers, and as a shuffle.

Statistics are from fixed seeds and given as z: 0 at the mean and 1 a standard deviation for random
permutations. Bounds are 4 to 5: a true shuffle is beyond them once in 10,000 tries or less. With 4
rounds the tests of few items, of fixed points and of lags fail.
"""

import numpy as np
import pytest
import torch

from megatron_mlr1.data.blend import blend
from megatron_mlr1.ops.extension import has_row
from megatron_mlr1.ops.sample_order import (
    LEAST_BITS,
    MOST_ITEMS,
    ROUNDS,
    sample_order,
    sample_order_reference,
)

SIZES = [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097, 1_000_003]
LEAF = torch.zeros(0, 3, dtype=torch.int64)
WORD = 2**64


def shuffles(size, num_epochs, key=5, first_epoch=0):
    """The items of some epochs of one stream alone: [num_epochs, size]."""
    stream, epoch, item = sample_order_reference(
        LEAF,
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([size]),
        torch.tensor([key]),
        ~0,
        first_epoch * size,
        num_epochs * size,
    )
    assert not stream.any()
    assert torch.equal(epoch, torch.arange(num_epochs).repeat_interleave(size) + first_epoch)
    return item.numpy().reshape(num_epochs, size)


def mixed(weights, num_items, seed=0, drawn=0):
    """Arguments of the op for some weights."""
    it = blend(weights)
    keys = np.random.default_rng(seed).integers(-(2**63), 2**63, len(weights))
    return (
        torch.from_numpy(it.tree),
        torch.arange(len(weights)) * drawn,
        torch.tensor(num_items),
        torch.from_numpy(keys),
        it.root,
    )


# The formulas, one sample at a time, in integers without a size.


def leaf_of(tree, root, sample):
    child = root
    while child >= 0:
        share, left, right = tree[child].tolist()
        before, after = ((x * (share % WORD) + WORD // 2) // WORD for x in (sample, sample + 1))
        sample, child = (before, left) if after > before else (sample - before, right)
    return ~child, sample


def splitmix64(seed, number):
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def fmix32(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def permuted(place, size, seed):
    if size == 1:
        return 0
    bits = max((size - 1).bit_length(), LEAST_BITS)
    low = (bits + 1) // 2
    words = [splitmix64(seed, number) for number in range(ROUNDS // 2)]
    keys = [key for word in words for key in (word >> 32, word % 2**32)]
    while True:
        left, right = place >> low, place % 2**low
        for key in range(0, ROUNDS, 2):
            left ^= fmix32(right ^ keys[key]) % 2 ** (bits - low)
            right ^= fmix32(left ^ keys[key + 1]) % 2**low
        place = (left << low) + right
        if place < size:
            return place


def definition(tree, drawn, num_items, keys, root, first, count):
    rows = []
    for sample in range(first, first + count):
        stream, number = leaf_of(tree, root, sample)
        epoch, place = divmod(drawn[stream].item() + number, num_items[stream].item())
        seed = splitmix64(keys[stream].item() % WORD, epoch)
        rows.append((stream, epoch, permuted(place, num_items[stream].item(), seed)))
    stream, epoch, item = zip(*rows, strict=True)
    return torch.tensor(stream, dtype=torch.int32), torch.tensor(epoch), torch.tensor(item)


def test_fmix32_is_that_of_murmur3():
    # Values of the C++ of github.com/aappleby/smhasher.
    assert [fmix32(word) for word in (0, 1, 0xFFFFFFFF)] == [0, 0x514E28B7, 0x81F16F39]


PLACES = [0, 1, 7919, 10**9, 2**40, 2**61]
MIXTURES = {
    "one": ([2.5], [1_000_003]),
    "tiny": ([1.0, 1.0, 3.0, 0.0, 1e-9, 0.1], [1, 2, 3, 4, 5, 1]),
    "paper": (
        [0.1066, 0.0693, 0.6375, 0.0503, 0.0636, 0.0503, 0.0225],
        [2**20 + k for k in SIZES[:7]],
    ),
    "large": ([0.7, 0.3], [MOST_ITEMS, 2**39 + 1]),
}


@pytest.mark.parametrize("first", PLACES)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_reference_is_its_formulas(mixture, first):
    arguments = mixed(*MIXTURES[mixture], drawn=10**6)
    expected = definition(*arguments, first, 200)
    for found, right in zip(sample_order_reference(*arguments, first, 200), expected, strict=True):
        assert found.dtype == right.dtype
        assert torch.equal(found, right)


@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_has_each_item_once(size):
    num_epochs = 3 if size < 10**6 else 1
    for epoch in shuffles(size, num_epochs, first_epoch=2):
        assert np.array_equal(np.sort(epoch), np.arange(size))


def test_the_largest_stream_gives_other_items_each_time():
    arguments = mixed([1.0], [MOST_ITEMS])
    item = sample_order_reference(*arguments, 2**39, 300_000)[2].numpy()
    assert np.unique(item).size == item.size
    assert 0 <= item.min() < 2**25
    assert MOST_ITEMS - 2**25 < item.max() < MOST_ITEMS
    cells = np.bincount(item >> 28, minlength=4096)
    assert abs(chi_square(cells)) < 4.5


def chi_square(counts):
    """z of counts that should be equal."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize(("size", "orders"), [(2, 2), (3, 6), (4, 24), (5, 120), (6, 720)])
def test_few_items_come_in_all_orders_equally_often(size, orders):
    found = shuffles(size, 40_000) @ size ** np.arange(size)
    counts = np.unique(found, return_counts=True)[1]
    assert counts.size == orders
    assert abs(chi_square(counts)) < 4.5


@pytest.mark.parametrize("size", [7, 16, 33, 64, 100])
def test_each_place_has_each_item_equally_often_and_fixed_points_are_poisson(size):
    num_epochs = 30_000
    found = shuffles(size, num_epochs)
    counts = np.stack([np.bincount(place, minlength=size) for place in found.T])
    for z in map(chi_square, counts):
        assert abs(z) < 5
    fixed = (found == np.arange(size)).sum(axis=1)
    assert abs(fixed.mean() - 1) * np.sqrt(num_epochs) < 4
    # The fourth central moment of Poisson(1) is 4, so its sample variance has variance 3 / n.
    assert abs(fixed.var() - 1) * np.sqrt(num_epochs / 3) < 4.5


MANY = [4096, 50_021, 65_536, 65_537]
LAGS = (1, 2, 3, 128, 256, 512)
"""With too few rounds those of the size of a half of the bits are correlated."""


def distinct(differences, size):
    """z of the number of different values, n random values of n leaving 1/e of them out."""
    never = np.exp(-1)
    found = np.count_nonzero(np.bincount(differences % size))
    return (found - size * (1 - never)) / np.sqrt(size * (never - 2 * never**2))


def correlation(one, other):
    """z of the correlation of two permutations."""
    a, b = one - one.mean(), other - other.mean()
    return (a * b).mean() / (a.std() * b.std()) * np.sqrt(a.size)


def assert_normal(zs, worst=5.0):
    """Many independent z: none far out, and together no wider than they should be."""
    zs = np.array(zs)
    assert np.abs(zs).max() < worst
    # The mean of n squares has the standard deviation sqrt(2 / n).
    assert abs((zs**2).mean() - 1) < 5 * np.sqrt(2 / zs.size)


@pytest.mark.parametrize("size", MANY)
def test_neighbours_and_lags_are_independent(size):
    epochs = shuffles(size, 12)
    rolled = [(epoch, np.roll(epoch, lag)) for epoch in epochs for lag in LAGS]
    assert_normal([correlation(one, other) for one, other in rolled])
    assert_normal([distinct(one - other, size) for one, other in rolled])
    assert_normal([distinct(epoch - np.arange(size), size) for epoch in epochs])


@pytest.mark.parametrize("size", MANY)
def test_places_and_items_share_no_cells(size):
    side = 32
    place = np.arange(size) * side // size
    zs = []
    for epoch in shuffles(size, 8):
        counts = np.bincount(place * side + epoch * side // size, minlength=side**2)
        rows = np.bincount(place)
        expected = np.outer(rows, rows).ravel() / size
        freedom = (side - 1) ** 2
        statistic = ((counts - expected) ** 2 / expected).sum()
        zs.append((statistic - freedom * size / (size - 1)) / np.sqrt(2 * freedom))
    assert_normal(zs)


@pytest.mark.parametrize("size", MANY)
def test_epochs_and_keys_are_independent(size):
    epochs = shuffles(size, 6)
    others = [shuffles(size, 6, key) for key in (4, 6, 5 + 2**32, -5)]
    pairs = [(epochs[i], epochs[j]) for i in range(6) for j in range(i)]
    pairs += [(one, other) for it in others for one, other in zip(epochs, it, strict=True)]
    # A key one lower must not give the next epoch's order one epoch later.
    pairs += [(epochs[i + 1], it[i]) for it in others for i in range(5)]
    assert_normal([correlation(one, other) for one, other in pairs])
    assert_normal([distinct(one - other, size) for one, other in pairs])


def test_the_op_is_one_that_torch_can_trace():
    torch.library.opcheck(
        torch.ops.mlr1.sample_order.default, (*mixed(*MIXTURES["paper"]), 12345, 77)
    )


@pytest.mark.parametrize("count", [0, 1])
def test_few_samples_or_none_are_fine(count):
    for op in (sample_order, sample_order_reference):
        found = op(*mixed(*MIXTURES["paper"]), 5, count)
        assert [(part.shape, part.dtype) for part in found] == [
            ((count,), torch.int32),
            ((count,), torch.int64),
            ((count,), torch.int64),
        ]


@pytest.mark.ext
@pytest.mark.parametrize("first", PLACES)
def test_the_compiled_row_gives_the_same_integers(first):
    assert has_row("mlr1::sample_order", "CPU")
    random = np.random.default_rng(first % 1000)
    for num_streams in (1, 2, 14, 200):
        weights = random.lognormal(0, 2, num_streams)
        sizes = [1 + int(x) for x in 2 ** random.uniform(0, 40, num_streams)]
        sizes[: len(SIZES)] = SIZES[:num_streams]
        arguments = mixed(weights.tolist(), sizes, seed=num_streams, drawn=10**9)
        compiled = sample_order(*arguments, first, 20_000)
        expected = sample_order_reference(*arguments, first, 20_000)
        for found, right in zip(compiled, expected, strict=True):
            assert found.dtype == right.dtype
            assert torch.equal(found, right)


@pytest.mark.ext
@pytest.mark.parametrize("size", [*SIZES, MOST_ITEMS - 1, MOST_ITEMS])
def test_the_compiled_row_permutes_alike(size):
    arguments = mixed([1.0], [size])
    for epoch in (0, 1, 1000):
        found = sample_order(*arguments, epoch * size, min(3 * size, 20_000))
        expected = sample_order_reference(*arguments, epoch * size, min(3 * size, 20_000))
        assert all(map(torch.equal, found, expected))
