from itertools import islice

import numpy as np
import pytest

from megatron_mlr1.data.documents import Frame, Ids, ids_of_lists, join, lay_out

LISTS = [[1, 2, 3], [], [4], [5, 6], [], [], [7], [8, 9]]
EACH = [1] * len(LISTS)
FRAMES = [
    Frame(),
    Frame(eod=90),
    Frame(before=(91, 92)),
    Frame(before=(91,), after=(93, 94), eod=90),
    Frame(after=(93,)),
]


def by_definition(counts: list[int], frame: Frame) -> list[list[list[int]]]:
    """Documents of sequences, step by step as Megatron-LM's tool makes them."""
    texts = iter(LISTS)
    documents = []
    for count in counts:
        framed = [[*frame.before, *ids, *frame.after] for ids in islice(texts, count)]
        sequences = [sequence for sequence in framed if sequence]
        if sequences and frame.eod is not None:
            sequences[-1].append(frame.eod)
        documents.append(sequences)
    return documents


@pytest.mark.parametrize("frame", FRAMES, ids=str)
@pytest.mark.parametrize("counts", [None, [2, 0, 3, 1, 0, 2], [0, 8], [1, 1, 2, 2, 1, 1, 0]])
def test_a_block_is_what_the_definition_makes(counts: list[int] | None, frame: Frame) -> None:
    documents = by_definition(counts or EACH, frame)
    sequences = [sequence for document in documents for sequence in document]

    block = lay_out(
        ids_of_lists(LISTS, len(LISTS)),
        None if counts is None else np.array(counts),
        frame,
        np.dtype("<u2"),
    )

    assert block.tokens.tolist() == [token for sequence in sequences for token in sequence]
    assert block.lengths.tolist() == [len(sequence) for sequence in sequences]
    assert block.sequences.tolist() == [len(document) for document in documents]
    assert block.tokens.dtype == np.dtype("<u2")


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_no_texts_make_an_empty_block(frame: Frame) -> None:
    nothing = ids_of_lists([], 0)
    for counts, documents in ((None, 0), (np.zeros(3, np.int64), 3)):
        block = lay_out(nothing, counts, frame, np.dtype("<i4"))
        assert (block.tokens.size, block.lengths.size) == (0, 0)
        assert block.sequences.tolist() == [0] * documents


def test_parts_and_joining_are_inverse() -> None:
    whole = ids_of_lists(LISTS, len(LISTS))
    joined = join([whole.part(0, 3), whole.part(3, 3), whole.part(3, 8)])
    assert joined.flat.tolist() == whole.flat.tolist()
    assert joined.lengths.tolist() == whole.lengths.tolist()


def test_a_tokenizer_that_loses_a_text_is_noticed() -> None:
    with pytest.raises(AssertionError, match="must answer every text"):
        ids_of_lists([[1]], 2)


def test_unsigned_ids_become_the_type_of_the_corpus() -> None:
    ids = Ids(np.array([128_255, 0], np.uint32), np.array([2]))
    block = lay_out(ids, None, Frame(eod=128_001), np.dtype("<i4"))
    assert block.tokens.tolist() == [128_255, 0, 128_001]
