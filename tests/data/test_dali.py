"""DALI brings the thread's batches, bit for bit."""

from itertools import islice

import pytest
import torch

from megatron_mlr1.data.dali import DaliLoader, _import
from megatron_mlr1.data.loader import Loader, Turns
from megatron_mlr1.data.rows import Rows
from megatron_mlr1.errors import DataError, MachineError

LENGTH = 16
TURNS = Turns(consumed=5, rank=1, num_ranks=2, micro_batch=3)


class Drawn:
    """Samples drawn by their number."""

    def __init__(self, *, apart: bool, last: int = 10**9) -> None:
        self.keeps_documents_apart = apart
        self.last = last

    def fill(self, rows: Rows, first: int) -> None:
        if first > self.last:
            raise DataError(f"sample {first} cannot be read")
        generator = torch.Generator().manual_seed(first)
        for tensor in rows.tensors:
            tensor.copy_(torch.randint(0, 1000, tensor.shape, generator=generator))


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(MachineError, match=r"pip install 'megatron_mlr1\[dali\]'"):
        _import("nvidia.no_such_package")


@pytest.fixture
def dali():
    pytest.importorskip(
        "nvidia.dali", reason="needs NVIDIA DALI, found none (pip install 'megatron_mlr1[dali]')"
    )


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("device", [None, pytest.param(0, marks=pytest.mark.gpu)])
def test_the_batches_are_the_threads_to_the_last_bit(apart, device):
    feed = Drawn(apart=apart)
    thread = Loader(feed, TURNS, LENGTH)
    pipeline = DaliLoader(Loader(feed, TURNS, LENGTH), TURNS.micro_batch, device=device)
    kept = []
    for _ in range(10):
        ours, theirs = next(thread), next(pipeline)
        kept.append((ours, theirs))
    for ours, theirs in kept:
        assert list(ours) == list(theirs)
        for name in ours:
            assert theirs[name].is_cuda == (device is not None)
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(ours[name], theirs[name].cpu())
    thread.close()
    pipeline.close()


@pytest.mark.usefixtures("dali")
def test_an_error_of_the_reader_comes_through_the_pipeline():
    loader = Loader(Drawn(apart=False, last=30), TURNS, LENGTH)
    pipeline = DaliLoader(loader, TURNS.micro_batch, device=None)
    with pytest.raises(DataError, match="cannot be read"):
        list(islice(pipeline, 10))
    pipeline.close()
