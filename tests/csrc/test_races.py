"""The emulator finds accesses that no barrier orders, whatever order threads run in."""

import shutil

import pytest
import torch

from tests.csrc.kernels import KernelError

THREADS = 128
ORDERS = (0, 1, 2, 3)
NEXT = [lane ^ 1 for lane in range(THREADS)]


@pytest.fixture(scope="module")
def kernels(emulated):
    return emulated("device")


@pytest.fixture(scope="module")
def x(kernels):
    return kernels.place(1 + torch.arange(THREADS).float())


# Blocks, blocks of a cluster, and the message in order 0.
RACES = {
    "read of what is written": (
        *(0, 1, 1),
        r"it reads 4 bytes 0 bytes from the begin of shared memory, that thread \(0, 0, 0\) of "
        r"block \(0, 0, 0\) wrote before any barrier.*\[thread \(1, 0, 0\) of block \(0, 0, 0\)\]",
    ),
    "write of what is read": (
        *(1, 1, 1),
        r"it writes 4 bytes .* that thread \(\d+, 0, 0\) .* read behind the barrier in line \d+, ",
    ),
    "shuffle for a barrier": (2, 1, 1, r"it reads 4 bytes .* wrote before"),
    "warp for block": (3, 1, 1, r"it reads .* that thread \(31, 0, 0\)"),
    "two blocks": (4, 2, 1, r"it writes .* a buffer of 1024, .* of block \(0, 0, 0\) wrote"),
    "two clusters": (4, 4, 2, r"it writes .* of block \(0, 0, 0\) wrote"),
    "two blocks of a cluster": (4, 2, 2, r"it writes .* of block \(0, 0, 0\) wrote"),
    "neighbour": (5, 2, 2, r"it writes .* of block \(1, 0, 0\) read behind"),
    "between the halves": (6, 2, 2, r"it reads .* wrote behind"),
    "ended": (7, 2, 2, r"the end of block 1 of a cluster and an access to its shared memory by"),
    "not begun": (8, 2, 2, r"memory of block 0 of the cluster, which may not have begun"),
    "atomic and not": (9, 1, 1, r"it changes 4 bytes .* that thread \(0, 0, 0\)"),
    "not published": (10, 2, 2, r"it reads .* wrote before any barrier"),
    "not written": (11, 1, 1, r"a read of what no thread wrote, 508 bytes from the begin"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("race", RACES)
def test_a_race_is_found_in_every_order(kernels, x, race, order):
    fault, blocks, cluster, message = RACES[race]
    out = kernels.place(torch.full((blocks * THREADS,), torch.nan))
    with pytest.raises(KernelError, match=message if order == 0 else ""):
        kernels.run("run_racing", fault, x, out, blocks, cluster, order=order)


@pytest.mark.skipif(shutil.which("addr2line") is None, reason="needs addr2line")
def test_the_message_names_the_line(kernels, x):
    out = kernels.place(torch.full((THREADS,), torch.nan))
    with pytest.raises(KernelError, match=r"orders the two at racing_kernels\.h:\d+"):
        kernels.run("run_racing", 0, x, out, 1, 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("blocks", "cluster"), [(1, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("way", range(6))
def test_what_barriers_order_is_no_race(kernels, x, way, blocks, cluster, order):
    out = kernels.place(torch.full((blocks * THREADS,), torch.nan))
    marks = kernels.place(torch.zeros(1, dtype=torch.int32))
    kernels.run("run_orderly", way, x, out, marks, blocks, cluster, order=order)
    torch.testing.assert_close(out, x[NEXT].repeat(blocks), rtol=2**-22, atol=0)
    assert marks.item() == (THREADS - 1 if way == 4 else 0)
