"""Ordinary memory for micro-batches, used again once nothing refers to it.

Fresh memory costs a page fault for every 4 KiB, more than the tokens that are written to it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Slabs:
    """Pieces of memory of one size, as many as are in use at once."""

    def __init__(self, num_bytes: int) -> None:
        """Allocate nothing yet; each piece will have `num_bytes`."""
        self._num_bytes = num_bytes
        self._free: list[_Piece] = []

    def take(self) -> NDArray[np.uint8]:
        """Give a piece; it comes back when the last array or tensor that views it is gone."""
        # Pieces come back in whatever thread drops them: pop and append are atomic.
        piece = self._free.pop() if self._free else _new(self._num_bytes)
        return np.asarray(_Lease(piece, self._free))


_Piece = tuple[NDArray[np.uint8], dict[str, Any]]
"""Memory, and what NumPy asks of it."""


def _new(num_bytes: int) -> _Piece:
    memory = np.empty(num_bytes, np.uint8)
    return memory, memory.__array_interface__


class _Lease:
    """What all views of a piece keep alive, by NumPy's array interface."""

    __slots__ = ("__array_interface__", "_free", "_piece")

    def __init__(self, piece: _Piece, free: list[_Piece]) -> None:
        self.__array_interface__ = piece[1]
        self._piece, self._free = piece, free

    def __del__(self) -> None:
        self._free.append(self._piece)
