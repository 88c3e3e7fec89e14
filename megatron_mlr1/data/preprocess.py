"""Files of JSON lines to corpora: reads in batches, tokenizes in worker processes, writes in order.

The documents of a corpus stand in the order of the input, whatever the number of workers. A batch
is about 1 MiB of text and only a few are under way, so memory does not grow with the input.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mlr1.data.index import DocumentBlock, IndexWriter, open_corpus, token_dtype
from megatron_mlr1.data.records import LineBatch, parse_texts, read_batches
from megatron_mlr1.data.tokenizers import Tokenizer
from megatron_mlr1.errors import ConfigError, DataError, MachineError

BATCHES_PER_WORKER = 3
Blocks = dict[str, DocumentBlock]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessPlan:
    """What to read and what to write, by the flags of Megatron-LM's tool where it has them."""

    inputs: tuple[Path, ...]
    """Files of JSON lines, read in this order."""
    output_prefix: str
    """Each key becomes the corpus `{output_prefix}_{key}_document`."""
    workers: int
    """Processes that tokenize."""
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    """End each document that has tokens with the tokenizer's id for that."""
    vocab_size: int | None = None
    """Ids must be smaller; None: the tokenizer's own number of ids."""
    overwrite: bool = False
    """Replace a corpus that is there."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}; tokenizing needs at least 1.")
        if len(set(self.json_keys)) < len(self.json_keys):
            raise ConfigError(
                f"--json-keys names a key twice ({' '.join(self.json_keys)}); each is one corpus. "
                "Name it once."
            )

    def corpus_prefix(self, key: str) -> str:
        """Name the corpus of one key, as Megatron-LM's tool does."""
        return f"{self.output_prefix}_{key}_document"


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """What one finished corpus holds, read back from its files."""

    prefix: str
    num_documents: int
    num_tokens: int
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class DocumentEncoder:
    """Turns lines into blocks of documents, as `tools/preprocess_data.py` of Megatron-LM does.

    A sentence without ids makes no sequence; a document without sequences gets no end-of-document.
    """

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    eod: int | None
    """Id that ends each document that has tokens; None: nothing is appended."""
    dtype: np.dtype[Any]
    vocab_size: int

    def encode(self, batch: LineBatch) -> Blocks:
        """Encode each key of each line.

        Raises:
            DataError: a line is wrong, or an id is not in the vocabulary.
        """
        texts = parse_texts(batch, self.keys)
        return {
            key: self._encode_key([record[key] for record in texts], batch) for key in self.keys
        }

    def _encode_key(self, documents: Sequence[Sequence[str]], batch: LineBatch) -> DocumentBlock:
        texts = [text for document in documents for text in document]
        encoded = self.tokenizer.encode(texts)
        assert len(encoded) == len(texts), "a tokenizer must answer every text"
        in_order = iter(encoded)
        ids: list[int] = []
        lengths: list[int] = []
        counts: list[int] = []
        for document in documents:
            sequences = [sequence for sequence in islice(in_order, len(document)) if sequence]
            if sequences and self.eod is not None:
                sequences[-1] = [*sequences[-1], self.eod]
            for sequence in sequences:
                ids += sequence
            lengths += map(len, sequences)
            counts.append(len(sequences))
        tokens = np.array(ids, np.int64)
        block = DocumentBlock(tokens, np.array(lengths, np.int64), np.array(counts, np.int64))
        self._refuse_ids_outside(block, batch)
        return replace(block, tokens=tokens.astype(self.dtype))

    def _refuse_ids_outside(self, block: DocumentBlock, batch: LineBatch) -> None:
        limit = min(self.vocab_size, int(np.iinfo(self.dtype).max) + 1)
        outside = np.flatnonzero((block.tokens < 0) | (block.tokens >= limit))
        if outside.size:
            sequence = np.searchsorted(np.cumsum(block.lengths), outside[0], side="right")
            document = np.searchsorted(np.cumsum(block.sequences), sequence, side="right")
            raise DataError(
                f"{batch.where(int(document))}: token id {block.tokens[outside[0]]} is outside the "
                f"vocabulary of {limit} ids. Use the tokenizer of the model, or mend --vocab-size."
            )


def preprocess(
    plan: PreprocessPlan,
    tokenizer: Tokenizer,
    on_progress: Callable[[int, int], None] = lambda documents, stored_bytes: None,
) -> list[CorpusSummary]:
    """Make one corpus of each key; all are finished together or none is left.

    Args:
        plan: what to read and write.
        tokenizer: makes the ids; it is copied to each worker.
        on_progress: told after each batch how many documents and how many bytes of the input files
            it was.

    Raises:
        ConfigError: an output exists, or an end-of-document is wanted that the tokenizer lacks.
        DataError: a line, a file or an id is wrong; names the first such line.
        MachineError: a file cannot be written, or a worker died.
    """
    encoder = _encoder(plan, tokenizer)
    with ExitStack() as stack:
        writers = {}
        for key in plan.json_keys:
            prefix = plan.corpus_prefix(key)
            writer = IndexWriter(prefix, encoder.dtype, overwrite=plan.overwrite)
            stack.callback(writer.discard)
            writers[key] = writer
        for batch, blocks in _encode_in_order(_batches(plan.inputs), encoder, plan.workers):
            for key, block in blocks.items():
                writers[key].write(block)
            on_progress(len(batch.lines), batch.num_stored_bytes)
        for key, writer in writers.items():
            if writer.num_tokens == 0:
                raise DataError(
                    f"{key!r} is empty in all {writer.num_documents} documents; a corpus needs "
                    "tokens. Leave the key out of --json-keys, or mend the input."
                )
            writer.seal()
        for writer in writers.values():
            writer.publish()
    return [_summary(plan.corpus_prefix(key)) for key in plan.json_keys]


def _encoder(plan: PreprocessPlan, tokenizer: Tokenizer) -> DocumentEncoder:
    vocab_size = tokenizer.vocab_size if plan.vocab_size is None else plan.vocab_size
    eod = tokenizer.eod if plan.append_eod else None
    if plan.append_eod and eod is None:
        raise ConfigError(
            "--append-eod needs a tokenizer with an end-of-sequence token; this one has none. "
            "Add one to its configuration, or leave --append-eod out."
        )
    if eod is not None and eod >= vocab_size:
        raise ConfigError(
            f"--append-eod would write id {eod}, outside the vocabulary of {vocab_size} ids. "
            "Mend --vocab-size or the tokenizer."
        )
    return DocumentEncoder(
        tokenizer, plan.json_keys, eod, token_dtype(tokenizer.vocab_size), vocab_size
    )


def _summary(prefix: str) -> CorpusSummary:
    corpus = open_corpus(prefix)
    return CorpusSummary(prefix, corpus.num_documents, corpus.num_tokens, corpus.tokens.dtype)


def _batches(paths: Sequence[Path]) -> Iterator[LineBatch]:
    for path in paths:
        yield from read_batches(path)


def _encode_in_order(
    batches: Iterator[LineBatch], encoder: DocumentEncoder, workers: int
) -> Iterator[tuple[LineBatch, Blocks]]:
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    under_way: deque[tuple[LineBatch, Future[Blocks]]] = deque()
    try:
        for batch in batches:
            under_way.append((batch, pool.submit(_encode_in_worker, batch)))
            if len(under_way) >= BATCHES_PER_WORKER * workers:
                batch, future = under_way.popleft()
                yield batch, future.result()
        while under_way:
            batch, future = under_way.popleft()
            yield batch, future.result()
    except BrokenProcessPool as error:
        raise MachineError(
            "A worker process died before its work was done; most often the machine was out of "
            "memory. Use fewer --workers and run again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: list[DocumentEncoder] = []
"""In a worker process: its encoder. A pool hands a worker its state in no other way."""


def _start_worker(encoder: DocumentEncoder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _worker_encoder.append(encoder)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: LineBatch) -> Blocks:
    return _worker_encoder[0].encode(batch)
