"""Which tokenizer makes the ids: the fast one where it agrees with the true one on the input.

The fast one begins at once; what it makes is held back until a process that runs `tokenizers` has
encoded the first documents and some hard texts too, and every id is the same.
"""

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain

from megatron_mlr1.data.documents import Frame, Ids
from megatron_mlr1.data.fast_tokenizer import (
    SAMPLE_CHARACTERS,
    FastTokenizer,
    first_difference,
    hard_texts,
)
from megatron_mlr1.data.pipeline import WorkerPool
from megatron_mlr1.data.texts import TextBatch
from megatron_mlr1.data.tokenizer_files import Definition
from megatron_mlr1.data.tokenizer_identity import TokenizerIdentity
from megatron_mlr1.data.tokenizers import TokenizerPlan

HELD_BATCHES = 8
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


def encode_in_processes(
    batches: Iterator[TextBatch], plan: TokenizerPlan, workers: int, engine: str
) -> Generator[Answer]:
    """Encode batches in order by the tokenizer of a plan.

    Raises:
        DataError: the tokenizer cannot be loaded.
        MachineError: a worker died.
    """
    with WorkerPool(plan, workers) as pool:
        texts = ((batch, batch.all_texts()) for batch in batches)
        for batch, ids in pool.encode_in_order(texts):
            yield Answer(batch, ids, Frame(), engine)


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
    assert identity.definition is not None, "the fast tokenizer is made of it"
    trial = _Trial(plan, identity.definition, check_documents)
    held, why = trial.run(batches, workers)
    if why is None:
        yield from held
        for batch in batches:
            yield trial.answer(batch)
        return
    logging.getLogger(__name__).warning(
        "gigatoken is not used: %s. %s makes the ids, which is slower.", why, identity.engine
    )
    again = chain([answer.batch for answer in held], batches)
    held.clear()
    yield from encode_in_processes(again, plan, workers, identity.engine)


class _Trial:
    """The comparison; afterwards `fast` is the tokenizer that was compared."""

    def __init__(self, plan: TokenizerPlan, definition: Definition, check_documents: int) -> None:
        self._plan, self._definition, self._check_documents = plan, definition, check_documents
        self._frame = definition.frame if plan.include_special_tokens else Frame()
        self._fast: FastTokenizer | None = None

    def answer(self, batch: TextBatch) -> Answer:
        """Encode a batch by the fast tokenizer, once it is loaded."""
        assert self._fast is not None, "it is loaded"
        assert self._frame is not None, "it is not loaded for other templates"
        return Answer(batch, self._fast.encode(batch.all_texts()), self._frame, self._fast.name)

    def run(self, batches: Iterator[TextBatch], workers: int) -> tuple[list[Answer], str | None]:
        """Encode the first batches; give them, and why the fast tokenizer must not be used."""
        if self._frame is None:
            return [], "the template of this tokenizer does more than to add tokens at the ends"
        with WorkerPool(self._plan, 1) as pool:
            # Its process loads the true tokenizer while this one loads the fast one.
            hard = hard_texts(self._definition.special_texts)
            verdicts = [pool.submit(hard)]
            try:
                self._fast = FastTokenizer(self._definition.content, workers)
            except ImportError:
                return [], "it is not installed (pip install 'megatron_mlr1[data]')"
            except ValueError as error:
                return [], f"it cannot read this tokenizer ({error})"
            samples, places, held = [hard], [[f"the text {text[:20]!r}" for text in hard]], []
            wanted = self._check_documents
            for batch in batches:
                held.append(self.answer(batch))
                if wanted > 0:
                    sample, where = _sample(batch, wanted)
                    wanted -= len(sample)
                    verdicts.append(pool.submit(sample))
                    samples.append(sample)
                    places.append(where)
                if len(held) == HELD_BATCHES or (wanted <= 0 and verdicts[-1].done()):
                    break
            for sample, where, verdict in zip(samples, places, verdicts, strict=True):
                wrong = first_difference(self._fast.encode(sample), verdict.result(), self._frame)
                if wrong is not None:
                    return held, f"it gives other ids than tokenizers for {where[wrong]}"
        return held, None


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
