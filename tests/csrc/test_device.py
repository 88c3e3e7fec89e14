"""The emulator of kernels finds their faults, and `common/reduce.h` has none."""

import pytest
import torch

ORDERS = (0, 1, 2, 3, 4)
THREADS = 128


def numbers(kernels, count=THREADS):
    return kernels.place(torch.randn(count, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("blocks", "cluster"), [(2, 1), (4, 4), (6, 3)])
def test_reductions_give_the_same_sums_in_every_order_of_threads(emulated, blocks, cluster):
    kernels = emulated("device")
    x = numbers(kernels, blocks * THREADS)
    results = []
    for order in ORDERS:
        out = kernels.place(torch.full((2, blocks), torch.nan))
        kernels.run("run_reduce", x, out, blocks, cluster, order=order)
        results.append(out.clone())
    of_block = x.view(blocks, THREADS).double().sum(1)
    of_cluster = of_block.view(-1, cluster).sum(1).repeat_interleave(cluster)
    expected = torch.stack((of_block, of_cluster)).float()
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_is_found_in_every_order_of_threads(emulated, order):
    kernels = emulated("device")
    x, out = numbers(kernels), kernels.place(torch.zeros(THREADS))
    kernels.run("run_turn_round", x, out, True, order=order)
    torch.testing.assert_close(out, x.flip(0), rtol=0, atol=0)
    with pytest.raises(Exception, match=r"a race|no thread wrote"):
        kernels.run("run_turn_round", x, out, False, order=order)
    with pytest.raises(Exception, match="a race"):
        kernels.run("run_reuse_without_barrier", x, out, order=order)


FAULTS = {
    0: (1, r"for ever at __syncthreads\(\) in line \d+: 16 of 128 are there"),
    1: (1, r"__syncthreads\(\) in line \d+ while other threads wait at __syncthreads"),
    2: (1, r"for ever at __shfl_xor_sync\(\) in line \d+: 16 of 32 are there"),
    3: (1, r"512 bytes from the begin of a buffer of 512 .*thread \(\d+, 0, 0\) of block"),
    4: (1, r"512 bytes from the begin of a buffer of 512 \[thread \(77, 0, 0\)"),
    5: (1, r"outside of memory: in no buffer: shared memory"),
    6: (1, r"undefined behaviour: a misaligned access"),
    7: (2, r"outside of memory: in no buffer: shared memory"),
    8: (2, r"the shared memory of block 1 of the cluster, which may not have begun"),
    9: (2, r"for ever at a barrier of the cluster in line \d+: 128 of 256 are there"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_a_message(emulated, fault):
    kernels = emulated("device")
    cluster, message = FAULTS[fault]
    x, out = numbers(kernels), kernels.place(torch.zeros(THREADS), alignment=16)
    with pytest.raises(Exception, match=message) as caught:
        kernels.run("run_faulty", fault, x, out, THREADS, cluster)
    assert type(caught.value).__name__ == "KernelError"
    # The machine is whole again behind a fault.
    kernels.run("run_turn_round", x, out, True)
    torch.testing.assert_close(out, x.flip(0), rtol=0, atol=0)


def test_a_grid_is_whole_clusters(emulated):
    kernels = emulated("device")
    x = numbers(kernels, 3 * THREADS)
    with pytest.raises(Exception, match="has no clusters of 2 blocks"):
        kernels.run("run_reduce", x, x, 3, 2)
