"""Which tokenizer makes the ids: the fast one where it agrees with the true one on the input.

The fast one begins at once; what it makes is held back until a process that runs `tokenizers` has
encoded the first documents and some hard texts too, and every id is the same. Of few texts the
true one makes the ids here, before the fast one would be loaded.
"""

import logging
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain

from megatron_mlr1.data.documents import Frame, Ids, ids_of_lists
from megatron_mlr1.data.fast_tokenizer import (
    SAMPLE_CHARACTERS,
    FastTokenizer,
    first_difference,
    hard_texts,
)
from megatron_mlr1.data.pipeline import WorkerPool
from megatron_mlr1.data.texts import TextBatch
from megatron_mlr1.data.tokenizer_identity import TokenizerIdentity, loader
from megatron_mlr1.data.tokenizers import TokenizerPlan

HELD_BATCHES = 12
"""Batches that may wait for the verdict; by then a quiet machine has it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The ids of all texts of a batch, key by key."""

    batch: TextBatch
    ids: Ids
    frame: Frame
    """What is still to be put around each text."""
    engine: str
    """The library that made them, with its version."""


def encode_here(
    batches: Iterator[TextBatch], plan: TokenizerPlan, identity: TokenizerIdentity
) -> Generator[Answer]:
    """Encode batches in this process, by the tokenizer of a plan.

    Raises:
        DataError: the tokenizer cannot be loaded.
    """
    tokenizer = loader(plan, identity)()
    for batch in batches:
        texts = batch.all_texts()
        ids = ids_of_lists(tokenizer.encode(texts), len(texts))
        yield Answer(batch, ids, Frame(), identity.engine)


def encode_in_processes(
    batches: Iterator[TextBatch], plan: TokenizerPlan, identity: TokenizerIdentity, workers: int
) -> Generator[Answer]:
    """Encode batches in order by the tokenizer of a plan, in other processes.

    Raises:
        DataError: the tokenizer cannot be loaded.
        MachineError: a worker died.
    """
    with WorkerPool(loader(plan, identity), workers) as pool:
        texts = ((batch, batch.all_texts()) for batch in batches)
        for batch, ids in pool.encode_in_order(texts):
            yield Answer(batch, ids, Frame(), identity.engine)


def encode_fast(
    batches: Iterator[TextBatch],
    plan: TokenizerPlan,
    identity: TokenizerIdentity,
    workers: int,
    check_documents: int,
) -> Generator[Answer]:
    """Encode batches in order, by gigatoken where it can be had and agrees with `tokenizers`.

    Otherwise `tokenizers` makes the ids, and a line of the log says why.

    Raises:
        DataError: the tokenizer cannot be loaded.
        MachineError: a worker died.
    """
    trial = _Trial(plan, identity, check_documents)
    why = trial.run(batches, workers)
    if why is None:
        yield from trial.answers
        trial.forget()
        for batch in batches:
            yield trial.answer(batch)
        return
    logging.getLogger(__name__).warning(
        "gigatoken is not used: %s. %s makes the ids, which is slower.", why, identity.engine
    )
    again = chain(trial.batches, batches)
    trial.forget()
    yield from encode_in_processes(again, plan, identity, workers)


@dataclass(frozen=True, slots=True)
class _Check:
    """Texts that the true tokenizer encodes too."""

    texts: list[str]
    places: list[str]
    """What to call each."""
    verdict: Future[Ids]
    """Its ids."""


class _Trial:
    """The comparison; afterwards `answer` is of the tokenizer that was compared."""

    def __init__(
        self, plan: TokenizerPlan, identity: TokenizerIdentity, check_documents: int
    ) -> None:
        assert identity.definition is not None, "the fast tokenizer is made of it"
        self.batches: list[TextBatch] = []
        """The first batches, which were read for it."""
        self.answers: list[Answer] = []
        """Of these batches."""
        self._load, self._check_documents = loader(plan, identity), check_documents
        self._definition = identity.definition
        self._frame = self._definition.frame if plan.include_special_tokens else Frame()
        self._fast: FastTokenizer | None = None

    def forget(self) -> None:
        """Let go of the first batches."""
        self.batches, self.answers = [], []

    def answer(self, batch: TextBatch) -> Answer:
        """Encode a batch by the fast tokenizer, once it is loaded."""
        assert self._fast is not None, "it is loaded"
        assert self._frame is not None, "it is not loaded for other templates"
        return Answer(batch, self._fast.encode(batch.all_texts()), self._frame, self._fast.name)

    def run(self, batches: Iterator[TextBatch], workers: int) -> str | None:
        """Encode the first batches; tell why the fast tokenizer must not be used, if so."""
        if self._frame is None:
            return "the template of this tokenizer does more than to add tokens at the ends"
        with WorkerPool(self._load, 1) as pool:
            # Its process loads the true tokenizer, and encodes, while this one loads the fast one.
            checks = list(self._ask(batches, pool))
            try:
                self._fast = FastTokenizer(self._definition.content, workers)
            except ImportError:
                return "it is not installed (pip install 'megatron_mlr1[data]')"
            except ValueError as error:
                return f"it cannot read this tokenizer ({error})"
            self._encode_until(checks, batches)
            for check in checks:
                ids, true = self._fast.encode(check.texts), check.verdict.result()
                wrong = first_difference(ids, true, self._frame)
                if wrong is not None:
                    return f"it gives other ids than tokenizers for {check.places[wrong]}"
        return None

    def _ask(self, batches: Iterator[TextBatch], pool: WorkerPool) -> Iterator[_Check]:
        """Have the true tokenizer encode hard texts and the beginning of the input."""
        hard = hard_texts(self._definition.special_texts)
        yield _Check(hard, [f"the text {text[:20]!r}" for text in hard], pool.submit(hard))
        wanted = self._check_documents
        while wanted > 0 and self._read(batches):
            sample, places = _sample(self.batches[-1], wanted)
            wanted -= len(sample)
            yield _Check(sample, places, pool.submit(sample))

    def _read(self, batches: Iterator[TextBatch]) -> bool:
        """Read a batch, unless there are no more or as many as may be held."""
        batch = next(batches, None) if len(self.batches) < HELD_BATCHES else None
        if batch is not None:
            self.batches.append(batch)
        return batch is not None

    def _encode_until(self, checks: list[_Check], batches: Iterator[TextBatch]) -> None:
        """Encode what was read, and more for as long as a verdict is awaited."""
        self.answers = [self.answer(batch) for batch in self.batches]
        while not all(check.verdict.done() for check in checks) and self._read(batches):
            self.answers.append(self.answer(self.batches[-1]))


def _sample(batch: TextBatch, num_documents: int) -> tuple[list[str], list[str]]:
    """Take texts of the first documents, and their places."""
    sample, where = [], []
    for texts in batch.texts.values():
        for index, text in enumerate(texts.texts):
            document = texts.document_of(index)
            if document >= num_documents:
                break
            sample.append(text[:SAMPLE_CHARACTERS])
            where.append(batch.where(document))
    return sample, where
