"""Which chats share a pack: best fit, longest first, in 16 bytes a chat (and up to 4 MB).

A pack is a row of L tokens; a chat is never cut. Chats are taken by falling length, each into the
fullest pack that still has room for it (best-fit decreasing). Since lengths are small whole
numbers, the packs are kept by the room that is left in them, and all chats of one length are
placed together: a step finds the least room that fits and fills every pack that has it.

Source of the method: D. S. Johnson, "Near-optimal bin packing algorithms", 1973; its use for
training rows: Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.errors import ConfigError, DataError

LOW = np.uint64(2**32 - 1)
HIGH = np.uint64(32)
MAX_PACK_LENGTH = 2**20
BLOCK = 1 << 14


@dataclass(frozen=True, slots=True)
class Packs:
    """N chats in P packs."""

    chats: NDArray[np.uint64]
    """(N,): which chat, pack after pack."""
    sizes: NDArray[np.int32]
    """(P,): chats in each pack, at least 1; they sum to N."""

    def each(self) -> Iterator[NDArray[np.uint64]]:
        """Yield the chats of each pack."""
        place = 0
        for size in self.sizes.tolist():
            yield self.chats[place : place + size]
            place += size


def refuse_pack_length(pack_length: int) -> None:
    """Refuse a length that no pack may have.

    Raises:
        ConfigError: it is one.
    """
    if not 2 <= pack_length <= MAX_PACK_LENGTH:
        raise ConfigError(
            f"--pack-length is {pack_length}; it must be from 2 to {MAX_PACK_LENGTH} tokens. "
            "Give the --seq-length of the training."
        )


def pack(lengths: NDArray[np.int32], pack_length: int, seed: int) -> Packs:
    """Put every chat into one pack; the same packs for the same arguments.

    Chats of the same length, the chats of a pack and the packs are in an order drawn by `seed`, so
    that neighbours in the input become neighbours in training by chance alone.

    Args:
        lengths: (N,), tokens of each chat, from 1 to `pack_length`.
        pack_length: tokens that a pack holds.
        seed: of the order.

    Raises:
        ConfigError: `pack_length` is out of range.
        DataError: there are no chats, or too many.
    """
    refuse_pack_length(pack_length)
    if not 0 < lengths.size < 2**32:
        raise DataError(f"{lengths.size} chats cannot be packed; there must be 1 to 2**32 - 1.")
    assert lengths.min() >= 1, "a chat must have a token"
    assert lengths.max() <= pack_length, "a chat must fit into a pack"
    rng = np.random.Generator(np.random.PCG64(seed))
    order = np.arange(lengths.size, dtype=np.uint32)
    rng.shuffle(order)
    keys = _longest_first(lengths, order, pack_length)
    num_packs = _best_fit(keys, pack_length)
    names = np.arange(num_packs, dtype=np.uint32)
    rng.shuffle(names)
    sizes = np.zeros(num_packs, np.int32)
    for first in range(0, keys.size, BLOCK):
        block = keys[first : first + BLOCK]
        packs = names[block >> HIGH]
        np.add.at(sizes, packs, 1)
        block &= LOW
        block |= packs.astype(np.uint64) << HIGH
    del names
    keys.sort()
    for first in range(0, keys.size, BLOCK):
        keys[first : first + BLOCK] = order[keys[first : first + BLOCK] & LOW]
    return Packs(keys, sizes)


def _longest_first(
    lengths: NDArray[np.int32], order: NDArray[np.uint32], pack_length: int
) -> NDArray[np.uint64]:
    """Sort (pack_length - length) << 32 | place in the drawn order."""
    keys = np.arange(lengths.size, dtype=np.uint64)
    for first in range(0, keys.size, BLOCK):
        here = lengths[order[first : first + BLOCK]]
        keys[first : first + BLOCK] |= (pack_length - here).astype(np.uint64) << HIGH
    keys.sort()
    return keys


def _best_fit(keys: NDArray[np.uint64], pack_length: int) -> int:
    """Write the pack of each chat over its length in `keys`; give the number of packs."""
    packs = _OpenPacks(pack_length)
    begin = 0
    while begin < keys.size:
        missing = int(keys[begin] >> HIGH)
        end = begin + int(np.searchsorted(keys[begin:], np.uint64((missing + 1) << 32)))
        while begin < end:
            chosen = packs.place(pack_length - missing, end - begin)
            part = keys[begin : begin + chosen.size]
            part &= LOW
            part |= chosen.astype(np.uint64) << HIGH
            begin += chosen.size
    return packs.number


class _OpenPacks:
    """The packs that have room, by their room."""

    def __init__(self, pack_length: int) -> None:
        self._pack_length = pack_length
        self._by_room: dict[int, array[int]] = {}
        self._rooms = 0
        """Bit r is set where some pack has room for just r tokens."""
        self.number = 0

    def place(self, length: int, count: int) -> NDArray[np.int64]:
        """Place up to `count` chats of `length` tokens, into packs of one and the same room.

        The result is that of placing chat after chat: the fullest pack with room is filled until
        its room is less than a chat, then the next.

        Returns:
            the pack of each chat that was placed, 1 to `count` of them.
        """
        fitting = self._rooms >> length
        room = self._pack_length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
        fit = room // length
        chosen = self._take(room, -(-count // fit)) if fitting else self._open(-(-count // fit))
        placed = np.repeat(chosen, fit)[:count]
        left = room - fit * length
        unused = chosen.size * fit - placed.size  # what the last pack could still have taken
        if unused:
            self._put(chosen[-1:], left + unused * length)
            chosen = chosen[:-1]
        self._put(chosen, left)
        return placed

    def _open(self, count: int) -> NDArray[np.int64]:
        self.number += count
        return np.arange(self.number - count, self.number)

    def _take(self, room: int, count: int) -> NDArray[np.int64]:
        stack = self._by_room[room]
        chosen = np.array(stack[-count:], np.int64)
        del stack[-count:]
        if not stack:
            del self._by_room[room]
            self._rooms &= ~(1 << room)
        return chosen

    def _put(self, packs: NDArray[np.int64], room: int) -> None:
        if packs.size and room:
            self._by_room.setdefault(room, array("I")).extend(packs.tolist())
            self._rooms |= 1 << room
