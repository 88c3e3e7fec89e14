import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mlr1.data.tokenizers import (
    LOADERS,
    TIKTOKEN_SPECIAL,
    RustTokenizer,
    TokenizerPlan,
    TransformersTokenizer,
    load_tokenizer,
)
from megatron_mlr1.errors import ConfigError, DataError

TrainBpe = Callable[..., Path]
Compare = Callable[[TokenizerPlan, list[str]], None]
HF = "HuggingFaceTokenizer"


@pytest.fixture
def assert_equals_the_engine(
    engine_tokenizer: Callable[[TokenizerPlan], Any],
) -> Callable[[TokenizerPlan, list[str]], None]:
    def compare(plan: TokenizerPlan, texts: list[str]) -> None:
        ours, engine = load_tokenizer(plan), engine_tokenizer(plan)
        want = [engine.tokenize(text) for text in texts]
        assert ours.encode(texts) == want
        assert (ours.vocab_size, ours.eod) == (engine.vocab_size, engine.eod)
        assert pickle.loads(pickle.dumps(ours)).encode(texts) == want

    return compare


@pytest.mark.parametrize("include_special_tokens", [True, False])
@pytest.mark.parametrize(
    ("config", "model", "kind"),
    [
        ({}, None, RustTokenizer),
        ({"bos_token": "<|begin_of_text|>"}, {"model_type": "llama4_text"}, RustTokenizer),
        ({"tokenizer_class": "TokenizersBackend"}, {"model_type": "llama"}, RustTokenizer),
        ({"extra_special_tokens": ["def", "<new>"]}, None, RustTokenizer),
        ({"eos_token": None, "sep_token": "<|end_of_text|>"}, None, RustTokenizer),
        ({"split_special_tokens": True}, None, TransformersTokenizer),
        ({}, {"model_type": "qwen2"}, TransformersTokenizer),
        ({"tokenizer_class": "GPT2TokenizerFast"}, {"model_type": "gpt2"}, TransformersTokenizer),
    ],
    ids=str,
)
def test_hugging_face_ids_are_those_of_the_engine(
    config: dict[str, Any],
    model: dict[str, Any] | None,
    kind: type,
    include_special_tokens: bool,
    texts: list[str],
    train_bpe: TrainBpe,
    tmp_path: Path,
    assert_equals_the_engine: Compare,
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True, **config)
    if model is not None:
        (folder / "config.json").write_text(json.dumps(model))
    plan = TokenizerPlan(
        tokenizer_type=HF,
        tokenizer_model=str(folder),
        include_special_tokens=include_special_tokens,
    )
    assert isinstance(load_tokenizer(plan), kind)
    assert_equals_the_engine(plan, texts)


def test_a_template_decides_whether_a_text_begins_with_a_token(
    train_bpe: TrainBpe, tmp_path: Path, assert_equals_the_engine: Compare
) -> None:
    for begins, empty in ((True, [0]), (False, [])):
        folder = train_bpe(tmp_path / str(begins), begins=begins)
        plan = TokenizerPlan(tokenizer_type=HF, tokenizer_model=str(folder))
        assert load_tokenizer(plan).encode([""]) == [empty]
        assert_equals_the_engine(plan, ["", "some text"])


def test_truncation_and_padding_of_the_file_do_not_touch_the_ids(
    texts: list[str], train_bpe: TrainBpe, tmp_path: Path, assert_equals_the_engine: Compare
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|begin_of_text|>",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    assert_equals_the_engine(TokenizerPlan(tokenizer_type=HF, tokenizer_model=str(folder)), texts)


@pytest.mark.parametrize(
    "name", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"]
)
def test_sentencepiece_ids_are_those_of_the_engine(
    name: str, texts: list[str], sentencepiece_model: Path, assert_equals_the_engine: Compare
) -> None:
    plan = TokenizerPlan(tokenizer_type=name, tokenizer_model=str(sentencepiece_model))
    assert_equals_the_engine(plan, texts)


@pytest.mark.parametrize("pattern", ["v1", "v2"])
@pytest.mark.parametrize("special", [(), ("<tool>", "<call>")])
def test_tiktoken_ids_are_those_of_the_engine(
    pattern: str,
    special: tuple[str, ...],
    texts: list[str],
    tiktoken_ranks: Path,
    assert_equals_the_engine: Compare,
) -> None:
    plan = TokenizerPlan(
        tokenizer_type="TikTokenizer",
        tokenizer_model=str(tiktoken_ranks),
        vocab_size=500,
        tiktoken_pattern=pattern,
        tiktoken_num_special_tokens=20,
        special_tokens=(*TIKTOKEN_SPECIAL, *special),
    )
    assert_equals_the_engine(plan, [*texts, "a</s>b <SPECIAL_19> c<tool> 1234 I'LL"])


@pytest.mark.parametrize(
    ("flags", "kind", "message"),
    [
        ({"vocab_size": 99_999}, DataError, "ranks do not count up"),
        ({"tiktoken_pattern": "v3"}, ConfigError, "--tiktoken-pattern v3 is not one of v1, v2"),
        ({"tiktoken_num_special_tokens": 6}, ConfigError, "must hold the 7 special tokens"),
        ({"special_tokens": ("<s>",)}, ConfigError, "must hold each of <unk> <s> </s>"),
    ],
)
def test_tiktoken_flags_that_cannot_be_are_refused(
    flags: dict[str, Any], kind: type[Exception], message: str, tiktoken_ranks: Path
) -> None:
    flags = {"vocab_size": 500, "tiktoken_num_special_tokens": 20} | flags
    plan = TokenizerPlan(
        tokenizer_type="TikTokenizer", tokenizer_model=str(tiktoken_ranks), **flags
    )
    with pytest.raises(kind, match=message):
        load_tokenizer(plan)


def test_tiktoken_ranks_that_do_not_begin_with_the_bytes_are_refused(
    tiktoken_ranks: Path, tmp_path: Path
) -> None:
    rows = json.loads(tiktoken_ranks.read_text())
    rows[65]["token_bytes"], rows[66]["token_bytes"] = (
        rows[66]["token_bytes"], rows[65]["token_bytes"],
    )  # fmt: skip
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps(rows))
    plan = TokenizerPlan(tokenizer_type="TikTokenizer", tokenizer_model=str(path), vocab_size=1300)
    with pytest.raises(DataError, match="are not the bytes in their order"):
        load_tokenizer(plan)


def test_byte_ids_are_those_of_the_engine(
    texts: list[str], assert_equals_the_engine: Compare
) -> None:
    assert_equals_the_engine(TokenizerPlan(tokenizer_type="ByteLevelTokenizer"), texts)


def test_the_byte_vocabulary_may_have_another_size() -> None:
    plan = TokenizerPlan(tokenizer_type="ByteLevelTokenizer", vocab_size=256)
    assert load_tokenizer(plan).vocab_size == 256
    with pytest.raises(ConfigError, match="at least 256"):
        load_tokenizer(TokenizerPlan(tokenizer_type="ByteLevelTokenizer", vocab_size=255))


def test_a_tokenizer_without_an_end_says_so(train_bpe: TrainBpe, tmp_path: Path) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=False, eos_token=None)
    plan = TokenizerPlan(tokenizer_type=HF, tokenizer_model=str(folder))
    assert load_tokenizer(plan).eod is None


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="GPT2BPETokenizer is not one of HuggingFaceTokenizer"):
        load_tokenizer(TokenizerPlan(tokenizer_type="GPT2BPETokenizer"))


@pytest.mark.parametrize("name", sorted(set(LOADERS) - {"ByteLevelTokenizer"}))
def test_a_model_that_is_not_named_or_no_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokenizer-model"):
        load_tokenizer(TokenizerPlan(tokenizer_type=name))
    wrong = tmp_path / "wrong"
    wrong.write_text("{no model")
    with pytest.raises(DataError, match=str(wrong)):
        load_tokenizer(TokenizerPlan(tokenizer_type=name, tokenizer_model=str(wrong)))


def test_a_damaged_tokenizer_json_is_refused(train_bpe: TrainBpe, tmp_path: Path) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(TokenizerPlan(tokenizer_type=HF, tokenizer_model=str(folder)))


def test_torch_transformers_and_the_engine_are_not_imported_for_a_plain_tokenizer(
    train_bpe: TrainBpe, sentencepiece_model: Path, tmp_path: Path
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True)
    program = (
        "import sys\n"
        "from megatron_mlr1.data import encode\n"
        "from megatron_mlr1.data.tokenizers import TokenizerPlan, load_tokenizer\n"
        f"for name, model in (('{HF}', {str(folder)!r}),\n"
        f"    ('SentencePieceTokenizer', {str(sentencepiece_model)!r})):\n"
        "    plan = TokenizerPlan(tokenizer_type=name, tokenizer_model=model)\n"
        "    load_tokenizer(plan)\n"
        "    encode.describe_tokenizer(plan)\n"
        "assert not {'torch', 'megatron', 'transformers', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
