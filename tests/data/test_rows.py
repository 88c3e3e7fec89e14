"""Rows are views of the tensors of a micro-batch."""

import numpy as np
import pytest

from megatron_mlr1.data.rows import Rows


def test_what_is_written_to_a_row_stands_in_the_tensors():
    rows = Rows(2, 4)
    for row in rows.each:
        row.tokens[:] = row.number
        row.labels[:] = 10 + row.number
        row.loss_mask[:] = 0.5
        row.longest[:] = 4 + row.number
    assert rows.tokens.tolist() == [[0] * 4, [1] * 4]
    assert rows.labels.tolist() == [[10] * 4, [11] * 4]
    assert rows.loss_mask.tolist() == [[0.5] * 4] * 2
    assert rows.longest.tolist() == [4, 5]


@pytest.mark.parametrize(
    ("ends", "bounds", "positions", "longest"),
    [
        ([6], [0, 6, 6, 6, 6, 6, 6], [0, 1, 2, 3, 4, 5], 6),
        ([1, 4, 6], [0, 1, 4, 6, 6, 6, 6], [0, 0, 1, 2, 0, 1], 3),
        ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0] * 6, 1),
    ],
)
def test_ends_become_bounds_and_positions(ends, bounds, positions, longest):
    rows = Rows(1, 6)
    for tensor in rows.tensors:
        tensor.fill_(77)
    (row,) = rows.each
    row.keep_apart(np.array(ends))
    assert rows.bounds.tolist() == [bounds]
    assert rows.position_ids.tolist() == [positions]
    assert rows.longest.tolist() == [longest]
