r"""The order of samples: number of a sample -> (stream, epoch, item), by integer arithmetic alone.

    n                  number of the sample in its phase
    stream, m          the leaf that n reaches in the blend's tree, and its number there
    epoch, k           divmod(drawn[stream] + m, num_items[stream])
    item               permutation(k) of num_items[stream], keyed by keys[stream] and epoch

**Tree** (`data/blend.py` builds it and bounds its deviation). At a node with the share f / 2**64 of
its left child, sample x goes left if floor(x f / 2**64 + 1/2) grows from x to x + 1; it is then
sample floor(x f / 2**64 + 1/2) of the left child, else x minus that of the right one.

**Permutation.** A Feistel network on the b = ceil(log2(n)) bits of a place, at least `LEAST_BITS`,
in halves of floor(b / 2) and ceil(b / 2) bits, and cycle walking: a result of n or more goes
through the network again, until it is below n (Black, Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002; from 33 items on less than two passes on average). A round adds the mixed
other half to a half:

    left  ^= fmix32(right ^ key_0),  right ^= fmix32(left ^ key_1),  left ^= ...    `ROUNDS` times

each cut to the half's bits. fmix32 is the finalizer of MurmurHash3 (Appleby, public domain,
github.com/aappleby/smhasher). The round keys are the upper and lower halves of the outputs of
SplitMix64, seeded with output `epoch` of SplitMix64 seeded with the stream's key
(`ops/splitmix.py`). With 3 rounds differences of neighbours repeat; with 4, places at a distance of
about sqrt(n) are correlated and fixed points vary too much, with 6 those of 100 items still do;
from 8 on, and with 6 bits, the tests see nothing.

The op is for tensors of the CPU; its compiled row gives the same integers.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import megatron_mlr1.ops.extension  # noqa: F401  registers the compiled rows
from megatron_mlr1.ops.splitmix import Words, outputs

ROUNDS = 8
LEAST_BITS = 6
"""With halves of one or two bits few items would not come in all orders equally often."""
MOST_ITEMS = 1 << 40
"""Halves of 20 bits; SplitMix64 and fmix32 have room for more, the tests for no more."""

Halves = NDArray[np.uint32]
_HALF, _LOW, _TOP = np.uint64(32), np.uint64(0xFFFFFFFF), np.uint64(63)
_FMIX32 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_SHIFT = np.uint32(16), np.uint32(13), np.uint32(16)


def sample_order(
    tree: Tensor,
    drawn: Tensor,
    num_items: Tensor,
    keys: Tensor,
    root: int,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the samples `first` to `first + count - 1` of a phase.

    Args:
        tree: int64 [M, 3], bits of the left child's share times 2**64, left child, right child; a
            child c is the node c, or the stream ~c where c < 0.
        drawn: int64 [N], samples that each stream gave before the phase.
        num_items: int64 [N], 1 to 2**40.
        keys: int64 [N], bits of the 64-bit key of each stream.
        root: the node or stream that all samples begin at.
        first: 0 or more; `first + count` at most 2**62.
        count: 0 or more.

    Returns:
        stream int32, epoch int64, item int64, each [count].
    """
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.mlr1.sample_order.default(
        tree, drawn, num_items, keys, root, first, count
    )
    return out


def sample_order_reference(
    tree: Tensor,
    drawn: Tensor,
    num_items: Tensor,
    keys: Tensor,
    root: int,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Define the op: serve where there is no compiled row, and judge it."""
    stream, number = _leaves(tree.numpy(), root, np.arange(first, first + count, dtype=np.uint64))
    sizes = num_items.numpy()
    size = sizes[stream]
    epoch, place = np.divmod(drawn.numpy()[stream] + number.astype(np.int64), size)
    seeds = outputs(keys.numpy().view(np.uint64)[stream], epoch.astype(np.uint64))
    bits = [max((n - 1).bit_length(), LEAST_BITS) if n > 1 else 0 for n in sizes.tolist()]
    item = _permute(
        place.astype(np.uint64), size.astype(np.uint64), np.array(bits, np.uint64)[stream], seeds
    )
    return (
        torch.from_numpy(stream.astype(np.int32)),
        torch.from_numpy(epoch),
        torch.from_numpy(item.astype(np.int64)),
    )


def _leaves(tree: NDArray[np.int64], root: int, sample: Words) -> tuple[NDArray[np.int64], Words]:
    """Go down the tree with all samples at once: the stream of each, and its number there."""
    child = np.full(sample.shape, root, np.int64)
    active = np.flatnonzero(child >= 0)
    while active.size:
        row = tree[child[active]]
        share, x = row[:, 0].view(np.uint64), sample[active]
        low = share * x
        before = _high_word(share, x) + (low >> _TOP)
        # The fraction of x f / 2**64 + 1/2 is `low` with its top bit turned; one f more carries.
        goes_left = (low ^ np.uint64(1 << 63)) > ~share
        sample[active] = np.where(goes_left, before, x - before)
        child[active] = np.where(goes_left, row[:, 1], row[:, 2])
        active = active[child[active] >= 0]
    return ~child, sample


def _high_word(a: Words, b: Words) -> Words:
    """Give the upper 64 bits of the products."""
    a_high, a_low, b_high, b_low = a >> _HALF, a & _LOW, b >> _HALF, b & _LOW
    middle = a_high * b_low + ((a_low * b_low) >> _HALF)
    upper: Words = a_high * b_high + (middle >> _HALF)
    upper += (a_low * b_high + (middle & _LOW)) >> _HALF
    return upper


def _permute(place: Words, size: Words, bits: Words, seeds: Words) -> Words:
    """Permute each place of 0 to size - 1 by its own key, in a network of `bits`."""
    numbers = np.arange(ROUNDS // 2, dtype=np.uint64)[:, None]
    words = outputs(seeds[None], numbers)
    keys = np.stack((words >> _HALF, words & _LOW), 1).reshape(ROUNDS, -1).astype(np.uint32)
    item = _feistel(place, bits, keys)
    outside = np.flatnonzero(item >= size)
    while outside.size:
        item[outside] = _feistel(item[outside], bits[outside], keys[:, outside])
        outside = outside[item[outside] >= size[outside]]
    return item


def _feistel(place: Words, bits: Words, keys: Halves) -> Words:
    """Pass once through the network; keys [ROUNDS, count]."""
    right_bits = (bits + np.uint64(1)) >> np.uint64(1)
    one = np.uint64(1)
    masks = [((one << width) - one).astype(np.uint32) for width in (bits - right_bits, right_bits)]
    halves = [(place >> right_bits).astype(np.uint32), place.astype(np.uint32) & masks[1]]
    for number in range(ROUNDS):
        turned, other = number % 2, 1 - number % 2
        halves[turned] ^= _fmix32(halves[other] ^ keys[number]) & masks[turned]
    left: Words = halves[0].astype(np.uint64) << right_bits
    return left | halves[1]


def _fmix32(word: Halves) -> Halves:
    word = (word ^ (word >> _SHIFT[0])) * _FMIX32[0]
    word = (word ^ (word >> _SHIFT[1])) * _FMIX32[1]
    return word ^ (word >> _SHIFT[2])


# Not `torch.library.custom_op`: its Python wrappers for gradients, which integers have none of,
# take longer than finding the samples of a micro-batch.
_LIBRARY = torch.library.Library("mlr1", "FRAGMENT")
_LIBRARY.define(
    "sample_order(Tensor tree, Tensor drawn, Tensor num_items, Tensor keys, int root, int first, "
    "int count) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("sample_order", sample_order_reference, "CompositeExplicitAutograd")


def _fake(
    tree: Tensor,
    drawn: Tensor,
    num_items: Tensor,
    keys: Tensor,
    root: int,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        drawn.new_empty((count,), dtype=torch.int32),
        drawn.new_empty((count,)),
        drawn.new_empty((count,)),
    )


torch.library.register_fake("mlr1::sample_order", _fake, lib=_LIBRARY)
