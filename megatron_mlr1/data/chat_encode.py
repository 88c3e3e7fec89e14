"""Batches of records to tokenized chats, in worker processes, in the order of the input."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.chat import Message
from megatron_mlr1.data.chat_layouts import LAYOUTS, Record, read_questions
from megatron_mlr1.data.chat_records import RecordBatch
from megatron_mlr1.data.chat_template import TokenizedChat, load_chat_tokenizer
from megatron_mlr1.data.pipeline import signals_later
from megatron_mlr1.errors import DataError, MachineError

TARGET = np.uint32(1 << 31)
"""Set in the word of a token that is a target of training; the rest of the word is its id."""
BATCHES_PER_WORKER = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatEncoding:
    """What a worker must know."""

    tokenizer_model: str
    """A folder, or a name on the Hugging Face hub."""
    train_on: str
    """One of `chat_template.TRAIN_ON`."""
    pack_length: int
    """Longer chats do not fit."""
    truncate: bool = False
    """Cut longer chats to the length of a pack."""
    questions: Path | None = None
    """Questions of OpenCodeReasoning-2; see `chat_layouts.read_questions`."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A record that makes no chat of the corpus."""

    where: str
    """`file:line`, or `file:row`."""
    reason: str
    record: Record | None
    """What there is of it."""
    num_tokens: int | None = None
    """Of a chat that is whole and too long."""


@dataclass(frozen=True, slots=True)
class EncodedChats:
    """The chats of one batch: N chats of T tokens."""

    words: NDArray[np.uint32]
    """(T,): ids, with `TARGET`."""
    lengths: NDArray[np.int32]
    """(N,)"""
    refused: tuple[Refused, ...]
    num_cut: int
    """Chats that were cut."""
    num_records: int
    stored_bytes: int
    """What reading them took from the file as it is stored."""
    is_fast: bool
    """Whether gigatoken made the ids."""


class ChatEncoder:
    """Turns batches of records into tokens."""

    def __init__(self, plan: ChatEncoding) -> None:
        """Load the tokenizer, and the questions where there are some.

        Raises:
            ConfigError, DataError: one of them cannot be had.
        """
        self._plan = plan
        self._tokenizer = load_chat_tokenizer(plan.tokenizer_model, plan.train_on)
        self._questions = {} if plan.questions is None else read_questions(plan.questions)

    def encode(self, batch: RecordBatch) -> EncodedChats:
        """Encode the records of a batch that are chats and fit; keep the others apart."""
        refused: dict[int, Refused] = {}
        kept: list[tuple[int, str, Record]] = []
        chats: list[list[Message]] = []
        layout = LAYOUTS[batch.layout]
        for number, (where, record) in enumerate(batch.records()):
            if isinstance(record, DataError):
                refused[number] = Refused(where, str(record), None)
                continue
            try:
                chats.append(layout.messages(record, self._questions))
                kept.append((number, where, record))
            except DataError as error:
                refused[number] = Refused(where, str(error), record)
        words: list[NDArray[np.uint32]] = []
        num_cut = 0
        tokenized = self._tokenizer.tokenize(chats)
        for (number, where, record), chat in zip(kept, tokenized, strict=True):
            fitted = self._fit(chat)
            num_tokens = None if isinstance(chat, DataError) else chat.ids.size
            if isinstance(fitted, DataError):
                refused[number] = Refused(where, str(fitted), record, num_tokens)
            else:
                words.append(fitted)
                num_cut += fitted.size != num_tokens
        return EncodedChats(
            words=np.concatenate(words) if words else np.zeros(0, np.uint32),
            lengths=np.array([word.size for word in words], np.int32),
            refused=tuple(refused[number] for number in sorted(refused)),
            num_cut=num_cut,
            num_records=batch.num_records,
            stored_bytes=batch.stored_bytes,
            is_fast=self._tokenizer.encoder.is_fast,
        )

    def _fit(self, chat: TokenizedChat | DataError) -> NDArray[np.uint32] | DataError:
        if isinstance(chat, DataError):
            return chat
        limit, size = self._plan.pack_length, chat.ids.size
        if size > limit and not self._plan.truncate:
            return DataError(f"{size} tokens, and a pack holds {limit}")
        targets = chat.trained[:limit].astype(np.uint32)
        targets[0] = 0  # nothing comes before it, so nothing predicts it
        if not targets.any():
            return DataError(f"{size} tokens, and none of the first {limit} is to be learned")
        return chat.ids[:limit] | (targets * TARGET)


def encode_in_order(
    batches: Iterable[RecordBatch], plan: ChatEncoding, workers: int
) -> Iterator[EncodedChats]:
    """Encode batches in `workers` processes, of which few are under way at any time; one is this.

    Raises:
        MachineError: a worker died.
    """
    if workers == 1:
        yield from map(ChatEncoder(plan).encode, batches)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(plan,),
    )
    under_way: deque[Future[EncodedChats]] = deque()
    try:
        for batch in batches:
            with signals_later():
                under_way.append(pool.submit(_encode_in_worker, batch))
            if len(under_way) >= BATCHES_PER_WORKER * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise MachineError(
            "A worker process died before its work was done; most often the machine was out of "
            "memory. Use fewer --workers and run again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: list[ChatEncoder] = []
"""In a worker process: its encoder. A pool hands a worker its state in no other way."""


def _start_worker(plan: ChatEncoding) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _worker_encoder.append(ChatEncoder(plan))


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: RecordBatch) -> EncodedChats:
    return _worker_encoder[0].encode(batch)
