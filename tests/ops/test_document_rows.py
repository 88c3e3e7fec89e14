"""The rows of a micro-batch on every row of the op, against their formula token by token."""

import errno
import os
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_mlr1.ops.document_rows import (
    FINE,
    OUTSIDE,
    SHORT,
    TOGETHER,
    TOKEN_TYPES,
    UNREADABLE,
    Outcome,
    document_rows,
    document_rows_reference,
)
from megatron_mlr1.ops.extension import has_row

END = 3
TEXTS = {
    "no end": [1, 2, 4, 5, 6],
    "an end in the middle": [1, 3, 4, 5, 6],
    "an end at the begin": [3, 1, 4, 5, 6],
    "an end at the last input": [1, 2, 4, 3, 6],
    "an end that is a label alone": [1, 2, 4, 5, 3],
    "nothing but ends": [3, 3, 3, 3, 3],
}
KERNELS = ["reference", "op"]


def definition(text, end):
    """What a row must be, token by token."""
    length, begin = len(text) - 1, 0
    mask, positions, bounds = [], [], [0]
    for place, token in enumerate(text[:-1]):
        positions.append(place - begin)
        mask.append(0.0 if token == end else 1.0)
        if token == end or place == length - 1:
            begin = place + 1
            bounds.append(begin)
    longest = max(b - a for a, b in pairwise(bounds))
    bounds += [length] * (length + 1 - len(bounds))
    return text[:-1], text[1:], mask, positions, bounds, longest


def garbage(batch, length):
    """Six tensors of other numbers than any row would have."""
    shapes = [(batch, length)] * 4 + [(batch, length + 1), (batch,)]
    dtypes = [torch.int64, torch.int64, torch.float32, torch.int64, torch.int32, torch.int32]
    return tuple(torch.full(s, -9, dtype=d) for s, d in zip(shapes, dtypes, strict=True))


@pytest.fixture
def store(tmp_path):
    """Writes tokens to a file, and gives its descriptor."""
    files = []

    def write(tokens):
        path = tmp_path / f"{len(files)}.bin"
        path.write_bytes(tokens.tobytes())
        files.append(path.open("rb", buffering=0))
        return files[-1].fileno()

    yield write
    for file in files:
        file.close()


def run(store, tokens, *, first=0, size=None, place=0):
    """The run of a ring that lies in a file of its own."""
    file, kind = store(tokens), TOKEN_TYPES.index(tokens.dtype)
    return [file, kind, first, tokens.size - first if size is None else size, place]


def filled(kernel, runs, length, *, begin=0, end=END, num_ids=2**62, rows=None):
    """The six tensors of some runs, and what the op said."""
    rows = garbage(len(runs) - begin, length) if rows is None else rows
    arguments = torch.tensor(runs), begin, end, num_ids
    if kernel == "op":
        return rows, document_rows(*arguments, rows)
    fault, row, value = document_rows_reference(*arguments, *rows)
    return rows, None if fault == FINE else Outcome(fault, row, value)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOKEN_TYPES, ids=str)
def test_documents_kept_apart_match_the_definition(store, dtype, kernel):
    texts = list(TEXTS.values())
    rows, outcome = filled(kernel, [run(store, np.array(text, dtype)) for text in texts], 4)
    assert outcome is None
    for row, text in enumerate(texts):
        for tensor, expected in zip(rows, definition(text, END), strict=True):
            assert tensor[row].tolist() == expected


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_long_rows_match_the_definition(store, kernel, dtype):
    random = np.random.default_rng(0)
    texts = np.where(random.random((5, 2050)) < 0.01, END, random.integers(4, 32_000, (5, 2050)))
    texts[1, 700:] = 5  # documents longer and shorter than any stretch
    texts[2, ::2] = END
    rows, _ = filled(kernel, [run(store, text.astype(dtype)) for text in texts], 2049)
    for row, text in enumerate(texts.tolist()):
        for tensor, expected in zip(rows, definition(text, END), strict=True):
            assert tensor[row].tolist() == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_shortest_row_is_one_token_and_its_label(store, kernel):
    rows, _ = filled(kernel, [run(store, np.array([7, END], "<i4"))], 1)
    for tensor, expected in zip(rows, definition([7, END], END), strict=True):
        assert tensor[0].tolist() == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_rows_are_those_of_the_runs_from_the_first_on(store, kernel):
    runs = [run(store, np.arange(begin, begin + 4, dtype="<i8")) for begin in (10, 20, 30, 40)]
    rows, _ = filled(kernel, runs, 3, begin=1, rows=garbage(2, 3))
    assert rows[0].tolist() == [[20, 21, 22], [30, 31, 32]]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("first", "size", "place"), [(0, 9, 7), (2, 5, 4), (3, 2, 1), (8, 1, 0)])
def test_a_run_goes_round_its_ring_as_often_as_it_must(store, kernel, first, size, place):
    ring = np.arange(10, 20, dtype="<i4")
    rows, outcome = filled(
        kernel, [run(store, ring, first=first, size=size, place=place)], 6, end=TOGETHER
    )
    text = [10 + first + (place + i) % size for i in range(7)]
    assert outcome is None
    assert rows[0][0].tolist() == text[:-1]
    assert rows[1][0].tolist() == text[1:]


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_ends_every_token_is_trained_on_and_no_bounds_are_written(store, kernel):
    given = run(store, np.array([1, END, 4, 5], "<u2"))
    rows, _ = filled(kernel, [given], 3, end=TOGETHER)
    tokens, labels, mask, positions, bounds, longest = (tensor[0].tolist() for tensor in rows)
    assert (tokens, labels, mask) == ([1, END, 4], [END, 4, 5], [1.0, 1.0, 1.0])
    assert positions == [0, 1, 2]
    assert bounds == [-9] * 4
    assert longest == -9
    without, outcome = filled(
        kernel, [given], 3, end=TOGETHER, rows=(*garbage(1, 3)[:4], None, None)
    )
    assert outcome is None
    assert all(map(torch.equal, without[:4], rows[:4]))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("end", [255, 256, 259, -253])
def test_an_end_that_the_type_cannot_hold_is_in_no_text(store, kernel, end):
    given = run(store, np.array([1, 3, 0, 255, 2], "<u1"))
    rows, _ = filled(kernel, [given], 4, end=end)
    for tensor, expected in zip(rows, definition([1, 3, 0, 255, 2], end), strict=True):
        assert tensor[0].tolist() == expected


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [-2, 100, 2**31 - 1])
def test_the_first_row_with_an_id_that_is_none_is_told(store, kernel, bad):
    good, wrong = np.array([0, 99, 5], "<i4"), np.array([5, bad, 7], "<i4")
    runs = [run(store, text) for text in (good, wrong, wrong)]
    assert filled(kernel, runs, 2, num_ids=100)[1] == Outcome(OUTSIDE, 1, bad)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_file_that_ends_too_early_is_told_with_the_token_it_must_have(store, kernel):
    whole, cut = (run(store, np.arange(size, dtype="<u2"), size=9) for size in (9, 6))
    assert filled(kernel, [whole, cut], 4)[1] is None
    cut[-1] = 3
    assert filled(kernel, [whole, cut], 4)[1] == Outcome(SHORT, 1, 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_file_that_cannot_be_read_is_told_with_the_systems_reason(store, tmp_path, kernel):
    folder = os.open(tmp_path, os.O_RDONLY)
    unreadable = [folder, 0, 0, 9, 0]
    outcome = filled(kernel, [run(store, np.arange(9, dtype="<i4")), unreadable], 4)[1]
    os.close(folder)
    assert outcome == Outcome(UNREADABLE, 1, errno.EISDIR)


@pytest.mark.ext
def test_other_threads_run_while_rows_are_made(store):
    given = run(store, np.zeros(2, "<u2"))
    length = 3_000_000
    rows = garbage(1, length)  # round a ring of two tokens: a call that takes long

    def turns_during_a_call():
        turns = 0
        thread = threading.Thread(target=lambda: filled("op", [given], length, rows=rows))
        thread.start()
        while thread.is_alive():
            turns += 1
            time.sleep(0.001)
        return turns

    # This thread may be the one that a busy machine lets wait.
    assert any(turns_during_a_call() > 5 for _ in range(20))


@pytest.mark.ext
def test_the_library_has_a_row_for_the_cpu():
    assert has_row("mlr1::document_rows", "CPU")
