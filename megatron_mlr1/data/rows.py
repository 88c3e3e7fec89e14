"""The rows of a micro-batch, and what fills them: the protocols between corpora and the loader.

A loader makes the `Rows` of a micro-batch. The corpora of a run fill them in one of two ways: a
`Reader` of all corpora fills them at once, or a `Source` of each corpus fills one `Row` for each
sample. Where documents are kept apart, the bounds say so.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mlr1.data.sampler import Places

KINDS: dict[str, tuple[np.dtype[Any], torch.dtype]] = {
    "tokens": (np.dtype(np.int64), torch.int64),
    "labels": (np.dtype(np.int64), torch.int64),
    "position_ids": (np.dtype(np.int64), torch.int64),
    "loss_mask": (np.dtype(np.float32), torch.float32),
    "bounds": (np.dtype(np.int32), torch.int32),
    "longest": (np.dtype(np.int32), torch.int32),
}
"""The tensors of a micro-batch in the order of their memory, the widest numbers first."""


_Place = tuple[tuple[int, ...], np.dtype[Any], torch.dtype, int]
"""Shape, type for NumPy and for torch, first byte."""


class Rows:
    """The tensors of a micro-batch of B samples of L tokens; nothing is in them yet."""

    def __init__(
        self,
        batch: int,
        length: int,
        memory: NDArray[np.uint8] | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        """Lay the tensors out for B = `batch` samples of L = `length` tokens.

        Args:
            batch: samples.
            length: tokens of a sample.
            memory: `bytes_of(batch, length)` bytes to lie in; None allocates.
            pinned: allocate page-locked memory, from which a GPU copies while others compute.
                torch's own cache of it takes a tensor back only when every copy from it has ended.
        """
        self.batch = batch
        self.length = length
        self._memory = memory
        self._pinned = pinned

    # Each is made when it is asked for: one costs as much as a row of tokens, and where documents
    # are not kept apart nobody asks for the last two.

    @cached_property
    def tokens(self) -> Tensor:
        """(B, L)"""
        return self._tensor("tokens")

    @cached_property
    def labels(self) -> Tensor:
        """(B, L)"""
        return self._tensor("labels")

    @cached_property
    def loss_mask(self) -> Tensor:
        """(B, L)"""
        return self._tensor("loss_mask")

    @cached_property
    def position_ids(self) -> Tensor:
        """(B, L)"""
        return self._tensor("position_ids")

    @cached_property
    def bounds(self) -> Tensor:
        """(B, L + 1)"""
        return self._tensor("bounds")

    @cached_property
    def longest(self) -> Tensor:
        """(B,)"""
        return self._tensor("longest")

    def _tensor(self, name: str) -> Tensor:
        shape, kind, dtype, begin = _layout(self.batch, self.length)[name]
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, pin_memory=self._pinned)
        return torch.from_numpy(np.ndarray(shape, kind, self._memory, begin))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens, labels, loss mask, positions, bounds, longest."""
        tail = (self.position_ids, self.bounds, self.longest)
        return (self.tokens, self.labels, self.loss_mask, *tail)

    @cached_property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """The same six as views for NumPy."""
        return tuple(tensor.numpy() for tensor in self.tensors)

    @property
    def each(self) -> tuple["Row", ...]:
        """The rows one by one."""
        # Not kept: memory that is waited for must not hang in a cycle of references.
        return tuple(Row(self, number) for number in range(self.batch))


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of L tokens: views into the tensors of a micro-batch, to be written over.

    What stood in the memory before is still there, so a source writes every element; `bounds` and
    `longest` only where its documents are kept apart.
    """

    rows: Rows
    number: int
    """Which row of them, from 0."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(L,): what the model reads."""
        return self._view(0)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(L,): what it must predict at each place; any valid id where the loss mask is 0."""
        return self._view(1)

    @property
    def loss_mask(self) -> NDArray[np.float32]:
        """(L,): 1 where the prediction counts, 0 where it does not."""
        return self._view(2)

    @property
    def position_ids(self) -> NDArray[np.int64]:
        """(L,): place of each token in its document where those are kept apart, else in the row."""
        return self._view(3)

    @property
    def bounds(self) -> NDArray[np.int32]:
        """(L + 1,): 0, the end of each document in order, the last L; then L to the end."""
        return self._view(4)

    @property
    def longest(self) -> NDArray[np.int32]:
        """(1,): tokens of the longest document in this row."""
        return self.rows.arrays[5][self.number : self.number + 1]

    def _view(self, which: int) -> NDArray[Any]:
        view: NDArray[Any] = self.rows.arrays[which][self.number]
        return view

    def keep_apart(self, ends: NDArray[Any]) -> None:
        """Write `bounds`, `longest` and `position_ids` from the ends of the documents.

        Args:
            ends: (D,) integers, D >= 1, strictly increasing, the last L: where each document ends.
                Padding is part of the last document, or one of its own.
        """
        number, length = ends.size, self.tokens.size
        bounds = self.bounds
        bounds[0] = 0
        bounds[1 : number + 1] = ends
        bounds[number + 1 :] = length
        begins = bounds[:number]
        lengths = bounds[1 : number + 1] - begins
        self.longest[0] = lengths.max()
        np.subtract(_count(length), np.repeat(begins, lengths), out=self.position_ids)


@cache
def _count(length: int) -> NDArray[np.int64]:
    """Give 0 ... length - 1, made once for each length."""
    return np.arange(length)


def bytes_of(batch: int, length: int) -> int:
    """Count the bytes of a micro-batch."""
    (shape, kind, _, begin) = list(_layout(batch, length).values())[-1]
    return begin + prod(shape) * kind.itemsize


@cache
def _layout(batch: int, length: int) -> dict[str, _Place]:
    """Give the shape and types of each tensor, and the byte that it begins at."""
    odd = {"bounds": (batch, length + 1), "longest": (batch,)}
    layout: dict[str, _Place] = {}
    begin = 0
    for name, (kind, dtype) in KINDS.items():
        shape = odd.get(name, (batch, length))
        layout[name] = (shape, kind, dtype, begin)
        begin += prod(shape) * kind.itemsize
    return layout


class Reader(Protocol):
    """The samples of all corpora of a run."""

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether the rows have bounds; the same for every row."""

    def plan(self, places: Places) -> "Plan":
        """Make ready to read some neighbouring samples."""


class Plan(Protocol):
    """Some neighbouring samples that will be read."""

    def fill(self, rows: Rows, begin: int) -> None:
        """Fill all rows with neighbouring samples, the first being number `begin` of the plan.

        Raises:
            DataError: a corpus cannot be read, or holds an id that the model has no row for.
        """


class Source(Protocol):
    """The samples of one part of a corpus, row by row: training, validation or test."""

    @property
    def num_items(self) -> int:
        """Samples in one epoch, at least 1."""

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether the rows have bounds; the same for every row."""

    def read(self, epoch: int, item: int, row: Row) -> None:
        """Fill `row` with a sample: a pure function of its arguments and the files.

        Called from threads, several at once with different rows: keeps no state between calls,
        reads by position (`os.preadv`, which releases the GIL), never maps or reads whole files.

        Args:
            epoch: from 0.
            item: which sample of the epoch, 0 <= item < `num_items`; already shuffled, so that the
                source counts its samples in the order of its file.
            row: written over whole.

        Raises:
            DataError: the file cannot be read, or is no longer the one that was opened.
        """
