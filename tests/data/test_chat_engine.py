import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_mlr1.data.chat_engine import CheckedEncoder
from tests.support.chats import SPECIAL, TEXT, write_tokenizer

TEXTS = [f"{SPECIAL[0]}{part}{SPECIAL[-1]}" for part in TEXT.split("\n\n")]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def want(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def test_the_fast_engine_gives_the_ids_of_tokenizers(backend: Tokenizer) -> None:
    encoder = CheckedEncoder(backend, SPECIAL)
    for texts in (TEXTS, TEXTS * 3, []):
        assert [row.tolist() for row in encoder.encode(texts)] == want(backend, texts)
    assert encoder.is_fast


def test_a_tokenizer_that_gigatoken_does_not_know_is_left_to_tokenizers(
    backend: Tokenizer, tmp_path: Path
) -> None:
    definition = json.loads(backend.to_str())
    definition["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "bb"}
    other = Tokenizer.from_str(json.dumps(definition))
    encoder = CheckedEncoder(other, SPECIAL)
    assert [row.tolist() for row in encoder.encode(TEXTS)] == want(other, TEXTS)
    assert not encoder.is_fast
