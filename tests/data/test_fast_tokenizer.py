import json
import random
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer

from megatron_mlr1.data import fast_tokenizer
from megatron_mlr1.data.documents import Frame, ids_of_lists
from megatron_mlr1.data.fast_tokenizer import FastTokenizer, first_difference, hard_texts


@pytest.fixture(scope="module")
def definition(train_bpe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = train_bpe(tmp_path_factory.mktemp("fast") / "bpe", begins=True)
    return (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("threads", [1, 2])
def test_ids_are_those_of_tokenizers_also_of_hard_texts(
    threads: int, definition: bytes, texts: list[str]
) -> None:
    true = Tokenizer.from_buffer(definition)
    every = [*texts, *hard_texts(["<|begin_of_text|>", "<|end_of_text|>"])]
    lists = [true.encode(text, add_special_tokens=False).ids for text in every]
    ids = FastTokenizer(definition, threads).encode(every)
    assert ids.lengths.tolist() == [len(each) for each in lists]
    assert ids.flat.tolist() == [token for each in lists for token in each]


def test_no_texts_give_no_ids(definition: bytes) -> None:
    ids = FastTokenizer(definition, 1).encode([])
    assert (ids.flat.size, ids.lengths.size) == (0, 0)


def test_a_definition_that_it_does_not_know_is_refused(definition: bytes) -> None:
    odd = json.dumps(json.loads(definition) | {"normalizer": {"type": "Lowercase"}}).encode()
    with pytest.raises(ValueError, match="Lowercase"):
        FastTokenizer(odd, 1)


def test_memory_does_not_grow_with_new_words(
    definition: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 16 * 2**20
    monkeypatch.setattr(fast_tokenizer, "MEMORY_BYTES", 0)
    monkeypatch.setattr(fast_tokenizer, "CACHE_BYTES", limit)
    draw = random.Random(3)
    tokenizer = FastTokenizer(definition, 1)

    def words() -> list[str]:
        return [" ".join(f"{draw.getrandbits(60):x}" for _ in range(10_000)) for _ in range(6)]

    tokenizer.encode(words())
    process = psutil.Process()
    begin = process.memory_info().rss
    for _ in range(25):
        tokenizer.encode(words())
    grown = process.memory_info().rss - begin
    # 25 MB of words, which take some 15 times that where none is ever forgotten.
    assert grown < 6 * limit


def test_the_first_difference_is_found_with_the_template_around_the_texts() -> None:
    fast = ids_of_lists([[1, 2], [], [3], [4]], 4)
    frame = Frame(before=(8,), after=(9,))
    same = ids_of_lists([[8, 1, 2, 9], [8, 9], [8, 3, 9], [8, 4, 9]], 4)
    other = ids_of_lists([[8, 1, 2, 9], [8, 9], [8, 3, 9, 9], [4, 9]], 4)
    assert first_difference(fast, same, frame) is None
    assert first_difference(fast, other, frame) == 2
