import multiprocessing
import signal
import threading
import time
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path

import pytest

from megatron_mlr1.data.pipeline import WorkerPool, run_ahead, signals_later
from megatron_mlr1.data.tokenizers import TokenizerPlan, load_tokenizer
from megatron_mlr1.errors import DataError, MachineError

BYTES = TokenizerPlan(tokenizer_type="ByteLevelTokenizer")


def test_items_come_in_order_and_only_a_few_are_made_ahead() -> None:
    made: list[int] = []

    def numbers() -> Generator[int]:
        for number in range(50):
            made.append(number)
            yield number

    got = []
    for number in run_ahead(numbers(), depth=2):
        got.append(number)
        time.sleep(0.001)
        # One is asked for, two are ready, one waits for room.
        assert len(made) <= number + 5
    assert got == list(range(50))


def test_an_error_comes_where_its_item_would_be() -> None:
    def numbers() -> Generator[int]:
        yield 1
        yield 2
        raise DataError("the third")

    got: list[int] = []
    with pytest.raises(DataError, match="the third"):
        got.extend(run_ahead(numbers()))
    assert got == [1, 2]


def test_closing_ends_the_thread_and_what_it_ran() -> None:
    closed = threading.Event()

    def numbers() -> Generator[int]:
        try:
            yield from iter(int, 1)
        finally:
            closed.set()

    before = set(threading.enumerate())
    ahead = run_ahead(run_ahead(numbers()))
    assert [next(ahead) for _ in range(3)] == [0, 0, 0]
    ahead.close()
    assert closed.is_set()
    assert set(threading.enumerate()) <= before


def test_processes_encode_in_order_whatever_the_sizes() -> None:
    batches = [[], ["x" * 700_000] * 5, ["a", "", "é"], *([f"{n}"] for n in range(30))]

    def requests() -> Iterator[tuple[int, list[str]]]:
        yield from enumerate(batches)

    with WorkerPool(partial(load_tokenizer, BYTES), 2) as pool:
        answers = list(pool.encode_in_order(requests()))
    assert [number for number, _ in answers] == list(range(len(batches)))
    for (_, ids), texts in zip(answers, batches, strict=True):
        encoded = [text.encode() for text in texts]
        assert ids.lengths.tolist() == [len(each) for each in encoded]
        assert ids.flat.astype("u1").tobytes() == b"".join(encoded)


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    model = tmp_path / "no.model"
    model.write_text("none")
    plan = TokenizerPlan(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    with (
        WorkerPool(partial(load_tokenizer, plan), 1) as pool,
        pytest.raises(DataError, match="is no SentencePiece model"),
    ):
        pool.submit(["a"]).result()


def test_a_dead_worker_ends_the_work() -> None:
    def encode() -> None:
        others = set(multiprocessing.active_children())
        with WorkerPool(partial(load_tokenizer, BYTES), 1) as pool:
            pool.submit(["a"]).result()
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
            pool.submit(["b"]).result()

    with pytest.raises(MachineError, match="worker process died"):
        encode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_obeyed_behind_the_block_that_puts_it_off(number: signal.Signals) -> None:
    done = []

    def leave(number: int, frame: object) -> None:
        raise InterruptedError(number)

    def work() -> None:
        with signals_later():
            signal.raise_signal(number)
            done.append("the rest of the block")

    former = signal.signal(number, leave)
    try:
        with pytest.raises(InterruptedError):
            work()
        assert signal.getsignal(number) is leave
        with signals_later():
            done.append("undisturbed")
    finally:
        signal.signal(number, former)
    assert done == ["the rest of the block", "undisturbed"]


def test_a_thread_of_its_own_hears_no_signal_and_puts_off_none() -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with signals_later():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]
