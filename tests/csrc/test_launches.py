"""The device that tests describe refuses what such a device would, and runs what it would."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.csrc.devices import A100, H200, KIB, OLD_CODE, SLICE, HostCode, Launch
from tests.csrc.kernels import KernelError, Kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A launch; by default one that every device can run."""

    blocks: int = 16
    threads: int = 64
    cluster: int = 1
    shared_bytes: int = 0
    asked: int = 0
    guarded: int = 1


@pytest.fixture(scope="module")
def place(library):
    built = library(Path(__file__).parent / "launches.cu")
    host, kernels = HostCode(built), Kernels(built)

    def run(device, chosen):
        """What the kernel wrote, and how it was launched."""
        with host.on(device) as launches:
            out = torch.empty(chosen.blocks * chosen.threads or 1)
            assert out.isnan().all(), "memory that nobody wrote is not a number"
            words = (chosen.blocks, chosen.threads, chosen.cluster, chosen.shared_bytes)
            kernels.run("run_launch", out, *words, chosen.asked, chosen.guarded)
        return out, launches

    return run


@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_a_launch_runs_every_thread_and_is_written_down(place, cluster):
    chosen = Chosen(cluster=cluster, shared_bytes=KIB)
    out, launches = place(H200, chosen)
    ranks = torch.arange(16).remainder(cluster)
    assert torch.equal(out.view(16, 64)[:, 5], 2.0 * ranks + 10.0 * cluster)
    launch = Launch(grid=(16, 1, 1), block=(64, 1, 1), cluster=cluster, shared_bytes=KIB)
    assert launches == [launch]


REFUSED = {
    "no guard": (H200, Chosen(guarded=0), "no CUDAGuard"),
    "no blocks": (H200, Chosen(blocks=0), r"a grid of \(0, 1, 1\)"),
    "too many blocks": (H200, Chosen(blocks=2**31, threads=0), "a grid of"),
    "too many threads": (H200, Chosen(threads=1025), "a block of 1025 threads"),
    "no threads": (H200, Chosen(threads=0), r"a block of \(0, 1, 1\)"),
    "shared memory without asking": (
        H200,
        Chosen(shared_bytes=48 * KIB + 1),
        "49153 bytes of shared memory; this kernel may have 49152",
    ),
    "more shared memory than was asked for": (
        H200,
        Chosen(shared_bytes=100 * KIB, asked=99 * KIB),
        "may have 101376",
    ),
    "more shared memory than there is": (A100, Chosen(asked=164 * KIB), "167936 is more than"),
    "half a cluster": (H200, Chosen(blocks=15, cluster=2), "has no clusters of 2 blocks"),
    "too large a cluster": (H200, Chosen(cluster=16), "no room for clusters of 16"),
    "clusters of an older device": (A100, Chosen(cluster=2), "no room for clusters of 2"),
    "clusters in older code": (OLD_CODE, Chosen(cluster=2), "no room for clusters of 2"),
    "a cluster on a small device": (SLICE, Chosen(cluster=8), "no room for clusters of 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_device_cannot_run_is_refused(place, case):
    device, chosen, message = REFUSED[case]
    with pytest.raises(KernelError, match=message):
        place(device, chosen)


def test_shared_memory_that_was_asked_for_is_granted(place):
    chosen = Chosen(shared_bytes=227 * KIB, asked=227 * KIB)
    assert place(H200, chosen)[1][0].shared_bytes == 227 * KIB


def test_a_kernel_that_was_granted_more_once_must_ask_on_another_device(place):
    place(H200, Chosen(shared_bytes=100 * KIB, asked=100 * KIB))
    with pytest.raises(KernelError, match="may have 49152"):
        place(H200, Chosen(shared_bytes=100 * KIB))


def test_a_device_without_room_has_fewer_blocks_in_a_cluster(place):
    # Blocks of 200 KB have a multiprocessor each.
    small = Chosen(cluster=4, shared_bytes=200 * KIB, asked=200 * KIB)
    assert place(SLICE, small)[1][0].cluster == 4
