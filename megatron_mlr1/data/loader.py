"""Micro-batches of one data-parallel rank, read ahead by one thread.

Sample n of a run is the same whatever reads it. The ranks take turns with whole micro-batches, as
the engine's own sampler deals them out (`MegatronPretrainingSampler`, Megatron-Core 0.19):

    micro-batch k of rank r holds the samples  c + (k R + r) B  ...  c + (k R + r) B + B - 1

c samples consumed before, R ranks, B samples in a micro-batch. So the samples of a step depend
neither on R nor on B, and c is all that a resumed run must know.
"""

import weakref
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread, current_thread
from typing import Protocol, Self

import torch
from torch import Tensor

from megatron_mlr1.data.rows import Rows, bytes_of
from megatron_mlr1.data.slabs import Slabs

AHEAD = 4
"""Micro-batches that are ready or being read: enough for a file system to hesitate."""

Batch = dict[str, Tensor]
"""By the names that the engine looks for: tokens, labels, loss_mask, position_ids (B, L); and where
documents are kept apart cu_seqlens (B, L + 1) and max_seqlen (B,), as in `Rows`."""


class Filling(Protocol):
    """What fills rows by the number of their first sample."""

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether the rows have bounds."""

    def fill(self, rows: Rows, first: int) -> None:
        """Fill all rows with neighbouring samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """Which samples a data-parallel rank reads, in micro-batches."""

    consumed: int
    """Samples that the run consumed before."""

    rank: int
    num_ranks: int
    micro_batch: int
    """Samples of a micro-batch."""

    def first_sample(self, turn: int) -> int:
        """Give the first sample of this rank's micro-batch number `turn`."""
        return self.consumed + (turn * self.num_ranks + self.rank) * self.micro_batch


class Loader:
    """An endless iterator over the micro-batches of one rank.

    The tensors of a batch are its receiver's own: nothing is written to them later.
    """

    def __init__(
        self, feed: Filling, turns: Turns, seq_length: int, *, device: int | None = None
    ) -> None:
        """Start to read.

        Args:
            feed: where samples come from.
            turns: which of them.
            seq_length: tokens of a sample.
            device: the CUDA device that batches will go to: they lie in page-locked memory then.
        """
        # A pool of threads would do, but its futures cost more than a micro-batch's reading.
        self._wanted: SimpleQueue[range | None] = SimpleQueue()
        self._ready: SimpleQueue[Batch | Exception] = SimpleQueue()
        self._num_asked = self._num_given = 0
        self._error: Exception | None = None
        desk = _Desk(feed, turns, seq_length, device)
        # It does not know the loader, so that a loader that is dropped ends its thread.
        thread = Thread(
            target=desk.serve,
            args=(self._wanted, self._ready),
            name="mlr1-loader",
            daemon=True,  # else a process would wait for it before `_end` can be called
        )
        thread.start()
        self._end = weakref.finalize(self, _end, self._wanted, thread)

    def __iter__(self) -> Self:
        """Give the loader itself."""
        return self

    def __next__(self) -> Batch:
        """Give the next micro-batch.

        Raises:
            DataError: a corpus cannot be read; raised again by every later call.
            StopIteration: the loader is closed.
        """
        if self._error is not None:
            raise self._error
        if not self._end.alive:
            raise StopIteration
        num_wanted = self._num_given + AHEAD - self._num_asked
        # Waking the thread costs more than all else here, so it is done for several at once.
        if num_wanted >= AHEAD // 2:
            self._wanted.put(range(self._num_asked, self._num_asked + num_wanted))
            self._num_asked += num_wanted
        batch = self._ready.get()
        if isinstance(batch, Exception):
            self._error = batch
            raise batch
        self._num_given += 1
        return batch

    def close(self) -> None:
        """End the thread; the loader gives nothing more. The end of the process does it too."""
        self._end()


class _Desk:
    """What the thread works at."""

    def __init__(self, feed: Filling, turns: Turns, seq_length: int, device: int | None) -> None:
        self._feed = feed
        self._turns = turns
        self._length = seq_length
        self._device = device
        # torch has a cache of page-locked memory, and none of the ordinary kind.
        num_bytes = bytes_of(turns.micro_batch, seq_length)
        self._slabs = Slabs(num_bytes) if device is None else None

    def serve(
        self, wanted: "SimpleQueue[range | None]", ready: "SimpleQueue[Batch | Exception]"
    ) -> None:
        """Read the turns that are wanted, in their order, until None is, or one fails."""
        try:
            # A thread has a current device of its own, and page-locked memory belongs to one.
            if self._device is not None:
                torch.cuda.set_device(self._device)
            while (turns := wanted.get()) is not None:
                for turn in turns:
                    ready.put(self._read(turn))
        except Exception as error:
            ready.put(error)  # for the thread that waits to raise

    def _read(self, turn: int) -> Batch:
        memory = None if self._slabs is None else self._slabs.take()
        pinned = self._slabs is None
        rows = Rows(self._turns.micro_batch, self._length, memory, pinned=pinned)
        self._feed.fill(rows, self._turns.first_sample(turn))
        batch = {
            "tokens": rows.tokens,
            "labels": rows.labels,
            "loss_mask": rows.loss_mask,
            "position_ids": rows.position_ids,
        }
        if self._feed.keeps_documents_apart:
            batch |= {"cu_seqlens": rows.bounds, "max_seqlen": rows.longest}
        return batch


def _end(wanted: "SimpleQueue[range | None]", thread: Thread) -> None:
    with suppress(Empty):
        while True:
            wanted.get_nowait()
    wanted.put(None)
    # A loader in a cycle of references may be found by the thread itself.
    if thread is not current_thread():
        thread.join()
