"""The order of samples as a pure function: (seed, number of a sample) -> (stream, epoch, item).

The blend chooses the stream and counts its samples (`blend.py`, with the bound and its proof); the
count, divided by the stream's items, is the epoch and a place in it; a permutation keyed by seed,
stream and epoch turns the place into an item (`ops/sample_order.py`). Every epoch of a stream has
each of its items exactly once. Nothing is stored that grows with samples or items, so any process,
at any time, asks for the samples it needs, and the only state of a run is how many it has consumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mlr1.data.blend import Phase, Schedule
from megatron_mlr1.data.streams import stream_key
from megatron_mlr1.errors import DataError
from megatron_mlr1.ops.sample_order import MOST_ITEMS, sample_order

__all__ = ["Phase", "Places", "SampleOrder", "Stream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """What samples are drawn from: one part of one pair of files."""

    name: str
    """The corpus, as the mixture names it; several streams may share it."""

    key: str
    """What the permutation is keyed by, such as the file name of the prefix: it should stay the
    same when other corpora come or go. Two streams of one key and size have the same order."""

    weight: float
    """Share of the samples, zero or more, from sample 0 on."""

    num_items: int
    """Samples, or packs, of one epoch: 1 to 2**40."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_items <= MOST_ITEMS:
            raise DataError(
                f"{self.key} of {self.name} has {self.num_items} samples; it must have 1 to "
                f"{MOST_ITEMS}. Give a larger corpus or a larger part in --split, a shorter "
                "--seq-length, or leave it out of the mixture."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where some neighbouring samples come from."""

    stream: NDArray[np.int32]
    """(count,): number of the stream."""

    epoch: NDArray[np.int64]
    """(count,): how often the stream was through before."""

    item: NDArray[np.int64]
    """(count,): 0 to num_items - 1 of the stream."""


class SampleOrder:
    """The global order of samples of a run. O(streams) memory and start-up."""

    def __init__(self, streams: Sequence[Stream], seed: int, phases: Sequence[Phase] = ()) -> None:
        """Take the streams, whose weights hold from sample 0, and later changes of the weights.

        Raises:
            ConfigError: weights that are no weights, not one a stream, or phases out of order.
        """
        self.streams = tuple(streams)
        """The streams, by number."""
        self.keys = tuple(stream_key(seed, stream.key) for stream in streams)
        """The key of each stream, as `TokenPart.origin` takes it."""
        self._schedule = Schedule([stream.weight for stream in streams], phases)
        self._num_items = torch.tensor([stream.num_items for stream in streams])
        self._keys = torch.from_numpy(np.array(self.keys, np.uint64).view(np.int64))
        self._blends = [
            (it.root, torch.from_numpy(it.tree), torch.from_numpy(drawn))
            for it, drawn in zip(self._schedule.blends, self._schedule.drawn, strict=True)
        ]

    def places(self, first: int, count: int) -> Places:
        """Find the samples `first` to `first + count - 1`, `first` being 0 or more.

        A call costs much more than a sample (`benchmarks/bench_sampler.py`), so ask for many at
        once.
        """
        firsts = self._schedule.firsts
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        begin, end = first, first + count
        while begin < end or not found:
            phase = self._schedule.phase_of(begin)
            stop = min(end, firsts[phase + 1]) if phase + 1 < len(firsts) else end
            root, tree, drawn = self._blends[phase]
            found.append(
                sample_order(
                    tree,
                    drawn,
                    self._num_items,
                    self._keys,
                    root,
                    begin - firsts[phase],
                    stop - begin,
                )
            )
            begin = stop
        parts = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        stream, epoch, item = (part.numpy() for part in parts)
        return Places(stream=stream, epoch=epoch, item=item)

    def counts(self, consumed: int) -> NDArray[np.int64]:
        """Count the items drawn of each stream by the first `consumed` samples: (streams,).

        In closed form: the cost depends on the number of streams alone.
        """
        return self._schedule.counts(consumed)
