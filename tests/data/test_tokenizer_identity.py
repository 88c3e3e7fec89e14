import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_mlr1.data.tokenizer_identity import identify, loader
from megatron_mlr1.data.tokenizers import TokenizerPlan, load_tokenizer
from megatron_mlr1.errors import DataError

HF = "HuggingFaceTokenizer"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("config", "model", "library", "has_definition"),
    [
        ({"bos_token": "<|begin_of_text|>"}, None, "tokenizers", True),
        ({"extra_special_tokens": ["<new>"]}, None, "tokenizers", True),
        ({}, "qwen2", "transformers", False),
    ],
    ids=str,
)
def test_the_identity_of_a_hugging_face_folder_is_that_of_the_loaded_tokenizer(
    config: dict[str, Any],
    model: str | None,
    library: str,
    has_definition: bool,
    train_bpe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True, **config)
    if model is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model}))
    plan = TokenizerPlan(tokenizer_type=HF, tokenizer_model=str(folder))
    loaded, known = load_tokenizer(plan), identify(plan)
    assert (known.vocab_size, known.eod, known.bos) == (loaded.vocab_size, loaded.eod, loaded.bos)
    assert known.sha256 == sha256((folder / "tokenizer.json").read_bytes())
    assert known.library == loaded.library == library
    assert known.engine.startswith(f"{library} ")
    assert (known.definition is not None) == has_definition
    again = pickle.loads(pickle.dumps(loader(plan, known)))()
    assert again.library == library
    assert again.encode(["a <new> text"]) == loaded.encode(["a <new> text"])
    if known.definition is not None:
        backend = Tokenizer.from_buffer(known.definition.content)
        assert [backend.encode("a <new> text").ids] == loaded.encode(["a <new> text"])


def test_other_tokenizers_are_known_by_their_one_file(
    sentencepiece_model: Path, tiktoken_ranks: Path
) -> None:
    plans = {
        sentencepiece_model: TokenizerPlan(
            tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(sentencepiece_model)
        ),
        tiktoken_ranks: TokenizerPlan(
            tokenizer_type="TikTokenizer", tokenizer_model=str(tiktoken_ranks), vocab_size=1256
        ),
    }
    for path, plan in plans.items():
        known = identify(plan)
        assert known.sha256 == sha256(path.read_bytes())
        assert (known.eod, known.bos) == (2, 1)
        assert known.definition is None
    known = identify(TokenizerPlan(tokenizer_type="ByteLevelTokenizer"))
    assert (known.vocab_size, known.eod, known.bos, known.engine) == (512, 0, None, "bytes")
    assert known.sha256 == sha256(b"bytes")


def test_a_damaged_folder_is_refused_by_name(
    train_bpe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=f"--tokenizer-model {folder} cannot be loaded"):
        identify(TokenizerPlan(tokenizer_type=HF, tokenizer_model=str(folder)))


def test_a_file_is_loaded_whole_whatever_it_says_of_batches_and_not_once_it_is_another_one(
    train_bpe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True)
    file = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(file))
    plan = TokenizerPlan(tokenizer_type=HF, tokenizer_model=str(folder))
    known = identify(plan)
    assert known.file == file
    text = "more than three tokens, no multiple of nine"
    [ids] = loader(plan, known)().encode([text])
    assert [ids] == load_tokenizer(plan).encode([text])
    assert len(ids) > 3
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"tokenizer\.json was replaced while it was in use"):
        loader(plan, known)()
    file.write_text("{")
    with pytest.raises(DataError, match=f"--tokenizer-model {folder} cannot be loaded"):
        loader(plan, known)()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"null"),
        ("tokenizer.json", b'{"added_tokens": 3}'),
        (
            "tokenizer_config.json",
            b'{"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": 3}',
        ),
    ],
)
def test_files_that_are_json_and_no_tokenizer_are_refused(
    name: str, content: bytes, train_bpe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=False)
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=r"bpe cannot be loaded: .*\. Name a folder"):
        identify(TokenizerPlan(tokenizer_type=HF, tokenizer_model=str(folder)))
