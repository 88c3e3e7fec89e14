r"""Which stream each sample comes from: a low-discrepancy blend without a table.

The streams are the leaves of a Huffman tree of their weights. Each inner node shares its samples
between two children: of its first x samples

    left(x) = floor(x * share + 1/2)        go left, and x - left(x) go right

where `share` is the left child's part of the node's weight, rounded to a multiple of 2**-64. Sample
x of the node goes left if left(x + 1) > left(x), and is then sample left(x) of the left child, else
sample x - left(x) of the right one. So a sample finds its stream, and its number among the samples
of that stream, on the way from the root to a leaf; nothing is stored but the N - 1 nodes, the way
is as long as the entropy of the weights in bits at the mean (+ 1 at most), and there is no period
and no quota: a positive weight, however small, is drawn in its time, first at about 1/(2 weight).

Bound: of any first x samples each stream has its part of x within 1.75 samples, for any number of
streams and any weights. Proof: let d(v) bound the deviation of a node v, and r be v's part of its
parent p. Rounding adds at most 1/2, so d(v) <= 1/2 + r d(p), with d(root) = 0. Huffman joins the
two lightest nodes, so the sibling of an inner node p weighs at least the heavier child of p,
therefore at least p/2, and p is at most 2/3 of its own parent: inner nodes have d < 3/2. A leaf
with r >= 1/2 is the heavier child of p, so p is at most 1/(1 + r) of its parent, and d <= 1/2 +
r (1/2 + 3/2 / (1 + r)) < 7/4; a leaf with r < 1/2 has d <= 1/2 + r 3/2 < 5/4. Shares as multiples
of 2**-64 add x 2**-65 a level, which is nothing below 2**48 samples.

All arithmetic is on integers and fractions of them, so every machine gives the same blend.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.errors import ConfigError

WORD = 1 << 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Weights that hold from a sample on."""

    first_sample: int
    """The first sample that is drawn by them, 1 or more."""

    weights: tuple[float, ...]
    """One a stream, zero or more; they need not sum to one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendTree:
    """The tree of one set of weights; a child c is the node c, or the stream ~c where c < 0."""

    root: int
    """The node or stream that all samples begin at."""

    tree: NDArray[np.int64]
    """(M, 3): share of the left, heavier child times 2**64 (bits of a uint64), left child,
    right child. Children stand before their parents."""

    num_streams: int
    """Streams, those without weight too."""

    def counts(self, num_samples: int) -> NDArray[np.int64]:
        """Count the samples of each stream among the first `num_samples`: (num_streams,)."""
        counts = np.zeros(self.num_streams, np.int64)
        below = [0] * len(self.tree)

        def give(child: int, count: int) -> None:
            if child < 0:
                counts[~child] = count
            else:
                below[child] = count

        give(self.root, num_samples)
        for node in reversed(range(len(self.tree))):
            share, left, right = self.tree[node].tolist()
            on_the_left = (below[node] * (share % WORD) + WORD // 2) // WORD
            give(left, on_the_left)
            give(right, below[node] - on_the_left)
        return counts


def blend(weights: Sequence[float]) -> BlendTree:
    """Build the tree of some weights.

    Args:
        weights: one a stream, zero or more; they need not sum to one.

    Raises:
        ConfigError: a weight is below zero or no number, or none is above zero.
    """
    if not all(isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ConfigError(
            f"The weights of the mixture are {', '.join(map(repr, weights)) or 'missing'}; each "
            "must be a number of zero or more, and one above zero. Correct the mixture."
        )
    # The number breaks ties of weight, so that the tree depends on the weights alone.
    heap = [(Fraction(weight), i, ~i) for i, weight in enumerate(weights) if weight > 0]
    heapq.heapify(heap)
    rows: list[tuple[int, int, int]] = []
    while len(heap) > 1:
        light, _, right = heapq.heappop(heap)
        heavy, _, left = heapq.heappop(heap)
        share = min(round(heavy / (light + heavy) * WORD), WORD - 1)
        rows.append((share - WORD, left, right))  # the bits of it: a share is at least a half
        heapq.heappush(heap, (light + heavy, len(weights) + len(rows), len(rows) - 1))
    tree = np.array(rows, np.int64).reshape(-1, 3)
    return BlendTree(root=heap[0][2], tree=tree, num_streams=len(weights))


class Schedule:
    """Blends that follow each other; each stream counts its samples through all of them."""

    def __init__(self, weights: Sequence[float], phases: Sequence[Phase] = ()) -> None:
        """Take the weights of the first sample, and the phases that change them, in their order.

        Raises:
            ConfigError: weights that are no weights, not one a stream, or phases out of order.
        """
        self.firsts = (0, *(phase.first_sample for phase in phases))
        """The first sample of each phase."""
        for before, after in pairwise(self.firsts):
            if after <= before:
                raise ConfigError(
                    f"A phase of the mixture begins at sample {after}, after one that begins at "
                    f"{before}; each must begin after the one before it, the first at sample 0. "
                    "Put the changes of the mixture in their order."
                )
        for phase in phases:
            if len(phase.weights) != len(weights):
                raise ConfigError(
                    f"The phase from sample {phase.first_sample} has {len(phase.weights)} weights "
                    f"for {len(weights)} streams; each stream needs one, 0 where it pauses."
                )
        self.blends = (blend(weights), *(blend(phase.weights) for phase in phases))
        """The blend of each phase."""
        drawn = np.zeros(len(weights), np.int64)
        self.drawn = [drawn]
        """(N,) for each phase: samples of each stream before it."""
        for it, (first, end) in zip(self.blends, pairwise(self.firsts), strict=False):
            drawn = drawn + it.counts(end - first)
            self.drawn.append(drawn)

    def counts(self, consumed: int) -> NDArray[np.int64]:
        """Count the samples of each stream among the first `consumed` of all: (N,)."""
        phase = self.phase_of(max(consumed - 1, 0))
        return self.drawn[phase] + self.blends[phase].counts(consumed - self.firsts[phase])

    def phase_of(self, sample: int) -> int:
        """Give the number of the phase that draws a sample."""
        return sum(first <= sample for first in self.firsts) - 1
