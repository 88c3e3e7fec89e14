"""Any ranks and micro-batches give one global order; the reader's errors reach who reads."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from megatron_mlr1.data.loader import AHEAD, Loader, Turns
from megatron_mlr1.data.rows import Rows
from megatron_mlr1.errors import DataError

LENGTH = 4


class Numbers:
    """Samples whose tokens are their own number."""

    def __init__(self, *, apart: bool = False, last: int = 10**9) -> None:
        self.keeps_documents_apart = apart
        self.last = last
        self.filled = 0

    def fill(self, rows: Rows, first: int) -> None:
        if first > self.last:
            raise DataError(f"sample {first} cannot be read")
        self.filled += 1
        for row in rows.each:
            row.tokens[:] = row.labels[:] = first + row.number
            row.loss_mask[:] = row.position_ids[:] = 1
            row.bounds[:] = row.longest[:] = LENGTH


def turns(consumed: int = 0, rank: int = 0, num_ranks: int = 1, micro_batch: int = 1) -> Turns:
    return Turns(consumed=consumed, rank=rank, num_ranks=num_ranks, micro_batch=micro_batch)


@pytest.fixture
def open_loader():
    loaders = []

    def make(turns: Turns, feed: Numbers | None = None) -> Loader:
        loaders.append(Loader(feed or Numbers(), turns, LENGTH))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


Open = Callable[..., Loader]


def step(loaders: list[Loader], num_micro_batches: int) -> list[int]:
    """The samples of one step, over all ranks."""
    return sorted(
        sample
        for loader in loaders
        for _ in range(num_micro_batches)
        for sample in next(loader)["tokens"][:, 0].tolist()
    )


@pytest.mark.parametrize(("num_ranks", "micro_batch"), [(1, 1), (1, 8), (2, 4), (4, 2), (3, 4)])
def test_every_layout_reads_the_same_samples_in_each_step(open_loader, num_ranks, micro_batch):
    batch = 24
    loaders = [open_loader(turns(7, rank, num_ranks, micro_batch)) for rank in range(num_ranks)]
    for n in range(3):
        samples = step(loaders, batch // (num_ranks * micro_batch))
        assert samples == list(range(7 + n * batch, 7 + (n + 1) * batch))


def test_a_ramp_of_the_batch_size_and_a_resume_change_no_sample(open_loader):
    loaders = [open_loader(turns(0, rank, 2, 2)) for rank in range(2)]
    assert step(loaders, 1) == [0, 1, 2, 3]
    assert step(loaders, 3) == list(range(4, 16))
    later = [open_loader(turns(4, rank, 3, 4)) for rank in range(3)]
    assert step(later, 1) == list(range(4, 16))


def test_the_samples_are_those_of_the_engines_sampler(open_loader):
    sampler = pytest.importorskip("megatron.training.datasets.data_samplers")
    for rank in range(3):
        theirs = iter(sampler.MegatronPretrainingSampler(1000, 10, 4, rank, 3))
        ours = open_loader(turns(10, rank, 3, 4))
        for _ in range(5):
            assert next(ours)["tokens"][:, 0].tolist() == next(theirs)


def test_a_batch_has_what_the_engine_looks_for(open_loader):
    plain = next(open_loader(turns(micro_batch=2)))
    assert set(plain) == {"tokens", "labels", "loss_mask", "position_ids"}
    apart = next(open_loader(turns(micro_batch=2), Numbers(apart=True)))
    assert set(apart) == {*plain, "cu_seqlens", "max_seqlen"}
    assert apart["cu_seqlens"].shape == (2, LENGTH + 1)
    assert apart["max_seqlen"].tolist() == [LENGTH, LENGTH]


def test_a_batch_is_never_written_again(open_loader):
    loader = open_loader(turns(micro_batch=2))
    batches = [next(loader) for _ in range(20)]
    for n, batch in enumerate(batches):
        assert batch["tokens"][:, 0].tolist() == [2 * n, 2 * n + 1]


def test_an_error_of_the_reader_comes_after_the_batches_before_it_and_stays(open_loader):
    loader = open_loader(turns(), Numbers(last=2))
    assert [next(loader)["tokens"][0, 0].item() for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(DataError, match="sample 3 cannot be read"):
            next(loader)


def test_reading_ahead_is_bounded_and_ends_with_the_loader(open_loader):
    feed, before = Numbers(), reading_threads()
    loader = open_loader(turns(), feed)
    next(loader)
    (thread,) = reading_threads() - before
    loader.close()
    assert not thread.is_alive()
    assert feed.filled <= AHEAD


def reading_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("mlr1-loader")}


def test_a_loader_that_is_dropped_ends_its_thread():
    before = reading_threads()
    loader = Loader(Numbers(), turns(), LENGTH)
    next(loader)
    (thread,) = reading_threads() - before
    del loader
    assert not thread.is_alive()


def test_a_closed_loader_gives_nothing_more(open_loader):
    loader = open_loader(turns())
    next(loader)
    loader.close()
    loader.close()
    assert list(loader) == []


def test_a_process_ends_while_its_loader_reads(tmp_path):
    program = (
        "from tests.data.test_loader import Loader, Numbers, turns\n"
        "loader = Loader(Numbers(), turns(micro_batch=64), 4)\n"
        "print(next(loader)['tokens'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": "."},
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "torch.Size([64, 4])\n"), done.stderr
