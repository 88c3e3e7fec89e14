"""Work that goes on at the same time: a thread that runs ahead, and processes that encode.

Both are bounded, so memory does not grow with the input, and both keep the order.
"""

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from megatron_mlr1.data.documents import Ids, ids_of_lists, join
from megatron_mlr1.data.tokenizers import Tokenizer
from megatron_mlr1.errors import MachineError, Mlr1Error

TASK_CHARACTERS = 2**20
TASKS_PER_WORKER = 3


def run_ahead[T](items: Generator[T], depth: int = 1) -> Generator[T]:
    """Make items in a thread, up to `depth` of them before they are asked for.

    Closing this ends the thread behind the item that it is at, and closes `items`.
    """
    ahead: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    is_over = threading.Event()

    def make() -> None:
        try:
            for item in items:
                ahead.put((True, item))
                if is_over.is_set():
                    break
            ahead.put((False, None))
        except BaseException as error:  # raised again where the items are asked for
            ahead.put((False, error))
        finally:
            items.close()

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            is_item, found = ahead.get()
            if not is_item:
                break
            yield found
        if found is not None:
            raise found
    finally:
        is_over.set()
        while thread.is_alive():
            try:
                ahead.get(timeout=0.05)  # the thread may wait for room
            except queue.Empty:
                thread.join(0.05)


@contextmanager
def signals_later() -> Iterator[None]:
    """Put SIGINT and SIGTERM off to the end of a block, which their handlers may end by an error.

    A pool of processes must not be left in the middle of a start: Python may wait forever at its
    end for a thread that nobody knows of, and a process without its orders prints a traceback.
    """
    if threading.current_thread() is not threading.main_thread():  # no handler runs here
        yield
        return
    late: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: late.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for heard in late:
            signal.raise_signal(heard)


class WorkerPool:
    """Processes that each load the tokenizer and encode; usable in a `with` statement."""

    def __init__(self, load: Callable[[], Tokenizer], workers: int) -> None:
        """Start nothing yet; a process starts with the first texts, and calls `load` first."""
        self._workers = workers
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(load,),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise MachineError(
                "A worker process died before its work was done; most often the machine was out of "
                "memory. Use fewer --workers and run again."
            ) from error

    def submit(self, texts: Sequence[str]) -> Future[Ids]:
        """Have texts encoded by one process.

        Raises:
            BrokenProcessPool: a process died; as `MachineError` where the `with` statement ends.
        """
        with signals_later():
            return self._pool.submit(_encode_in_worker, list(texts))

    def encode_in_order[R](self, batches: Iterator[tuple[R, list[str]]]) -> Iterator[tuple[R, Ids]]:
        """Encode batches of texts, each cut into tasks of about a million characters."""
        under_way: deque[tuple[R, list[Future[Ids]]]] = deque()
        num_tasks = 0
        for batch, texts in batches:
            tasks = [self.submit(task) for task in _tasks(texts)]
            under_way.append((batch, tasks))
            num_tasks += len(tasks)
            while num_tasks >= TASKS_PER_WORKER * self._workers:
                batch, tasks = under_way.popleft()
                num_tasks -= len(tasks)
                yield batch, join([task.result() for task in tasks])
        for batch, tasks in under_way:
            yield batch, join([task.result() for task in tasks])


def _tasks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut texts into tasks; one task at least, if only of no texts."""
    begin, size = 0, 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= TASK_CHARACTERS:
            yield texts[begin : index + 1]
            begin, size = index + 1, 0
    if begin < len(texts) or not texts:
        yield texts[begin:]


_worker_tokenizer: list[Tokenizer | Mlr1Error] = []
"""In a worker process: its tokenizer. A pool hands a worker its state in no other way."""


def _start_worker(load: Callable[[], Tokenizer]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        _worker_tokenizer.append(load())
    except Mlr1Error as error:
        _worker_tokenizer.append(error)  # an error of an initializer has no way back, a task's has


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Ids:
    tokenizer = _worker_tokenizer[0]
    if isinstance(tokenizer, Mlr1Error):
        raise tokenizer
    return ids_of_lists(tokenizer.encode(texts), len(texts))
