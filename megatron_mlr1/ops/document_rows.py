"""The rows of a micro-batch from runs of L + 1 tokens in files: read, cast, and cut into documents.

    tokens[i]   = text[i]                      labels[i] = text[i + 1]
    loss[i]     = 0 where documents are kept apart and text[i] is an end, else 1
    position[i] = i - (end of the last document that ends before i, else 0), or i
    bounds      = 0, end of each document, L, L, ...

An end of document belongs to the document that it ends; its label is the first token of the next,
which is why it has no loss. A run goes round a ring of tokens: past its end it goes on at its
begin. One call makes a whole micro-batch without Python's lock, so a reading thread hardly takes
any time from the training beside it.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import megatron_mlr1.ops.extension  # noqa: F401  registers the compiled rows

TOGETHER = -1
"""In place of an end of document: documents are not kept apart."""

TOKEN_TYPES = tuple(np.dtype(f"<{code}") for code in ("u1", "i1", "i2", "u2", "i4", "i8"))
"""Types of a token in a file, by the number that a run names them with."""

FINE, UNREADABLE, SHORT, OUTSIDE = range(4)
"""What became of a micro-batch; see `Outcome`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why a micro-batch could not be made."""

    fault: int
    """UNREADABLE, SHORT or OUTSIDE."""
    row: int
    """The first row with the fault; what later rows hold is undefined."""
    value: int
    """The system's error number; or the token of the file, counted from 0, before which it must not
    end; or the id that is none."""


def document_rows(
    runs: Tensor, begin: int, end: int, num_ids: int, rows: tuple[Tensor | None, ...]
) -> Outcome | None:
    """Write the rows of a micro-batch; None where all went well.

    Args:
        runs: int64 [N, 5]: descriptor of the open file, number of its type in `TOKEN_TYPES`, first
            token of the ring, tokens of the ring (1 or more), place in the ring that the run
            begins at.
        begin: the run of the first row; the others follow.
        end: the id that ends documents, or `TOGETHER`.
        num_ids: ids are 0 to `num_ids` - 1.
        rows: tokens, labels [B, L] int64, loss mask [B, L] float32, positions [B, L] int64; then
            bounds [B, L + 1] int32 and longest document [B] int32, not touched for `TOGETHER` and
            None where nobody wants them. All contiguous, on the CPU.
    """
    fault, row, value = torch.ops.mlr1.document_rows.default(runs, begin, end, num_ids, *rows)
    return None if fault == FINE else Outcome(fault, row, value)


def document_rows_reference(
    runs: Tensor, begin: int, end: int, num_ids: int, *rows: Tensor | None
) -> tuple[int, int, int]:
    """Define the op: serve where there is no compiled row, and judge that row."""
    views = [None if tensor is None else tensor.numpy() for tensor in rows]
    assert views[0] is not None, "the tokens are always wanted"
    batch, length = views[0].shape
    for row, run in enumerate(runs[begin : begin + batch].tolist()):
        file, kind, first, size, place = run
        text = np.empty(length + 1, TOKEN_TYPES[kind])
        done = 0
        while done < text.size:
            count = min(text.size - done, size - place)
            fault, value = _read(file, text[done : done + count], first + place)
            if fault != FINE:
                return fault, row, value
            done += count
            place = 0
        _write(text, end, [None if view is None else view[row, ...] for view in views])
        smallest, largest = int(text.min()), int(text.max())
        if smallest < 0 or largest >= num_ids:
            return OUTSIDE, row, smallest if smallest < 0 else largest
    return FINE, 0, 0


def _read(file: int, piece: NDArray[Any], token: int) -> tuple[int, int]:
    left, offset = memoryview(piece).cast("B"), token * piece.itemsize
    while left:
        try:
            num_bytes = os.preadv(file, [left], offset)
        except OSError as error:
            return UNREADABLE, error.errno or 0
        if num_bytes == 0:
            return SHORT, token + piece.size
        left, offset = left[num_bytes:], offset + num_bytes
    return FINE, 0


def _write(text: NDArray[Any], end: int, row: list[Any]) -> None:
    tokens, labels, loss_mask, position_ids, bounds, longest = row
    length = text.size - 1
    tokens[:] = text[:-1]
    labels[:] = text[1:]
    loss_mask[:] = 1
    position_ids[:] = np.arange(length)
    if end == TOGETHER:
        return
    ends = np.flatnonzero(text[:-1] == end) + 1
    loss_mask[ends - 1] = 0
    cuts = np.concatenate(([0], ends[ends < length], [length]))
    lengths = np.diff(cuts)
    position_ids -= np.repeat(cuts[:-1], lengths)
    bounds[:] = np.pad(cuts, (0, length + 1 - cuts.size), constant_values=length)
    longest[...] = lengths.max()


# Not `torch.library.custom_op`: its Python wrappers for gradients, which integers have none of,
# take longer than a row.
_LIBRARY = torch.library.Library("mlr1", "FRAGMENT")
_LIBRARY.define(
    "document_rows(Tensor runs, int begin, int end, int num_ids, Tensor(a!) tokens, "
    "Tensor(b!) labels, Tensor(c!) loss_mask, Tensor(d!) position_ids, Tensor(e!)? bounds, "
    "Tensor(f!)? longest) -> (int, int, int)"
)
_LIBRARY.impl("document_rows", document_rows_reference, "CompositeExplicitAutograd")
