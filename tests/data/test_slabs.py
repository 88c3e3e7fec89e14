"""Memory comes back when nothing refers to it, and never before."""

import numpy as np
import torch

from megatron_mlr1.data.slabs import Slabs


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_a_piece_that_nothing_refers_to_is_given_again():
    slabs = Slabs(64)
    first = slabs.take()
    assert first.nbytes == 64
    where = address(first)
    del first
    assert address(slabs.take()) == where


def test_a_view_of_a_tensor_of_a_piece_keeps_it():
    slabs = Slabs(64)
    piece = slabs.take()
    view = torch.from_numpy(piece).view(torch.int64)[2:4].view(1, 2)
    view.fill_(7)
    del piece
    others = [slabs.take() for _ in range(3)]
    for other in others:
        other[:] = 1
    assert view.tolist() == [[7, 7]]
    held = view.data_ptr() - 16
    del view
    assert address(slabs.take()) == held


def test_pieces_in_use_at_once_are_apart():
    slabs = Slabs(16)
    pieces = [slabs.take() for _ in range(4)]
    for number, piece in enumerate(pieces):
        piece[:] = number
    assert [np.unique(piece).tolist() for piece in pieces] == [[0], [1], [2], [3]]
