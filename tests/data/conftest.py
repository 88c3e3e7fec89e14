"""Real text and small tokenizers trained on it, for all tests of this folder."""

import base64
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_mlr1.data.tokenizers import TokenizerPlan

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
ODD_TEXTS = ["", " ", "naïve café 東京 🙂", f"a {END} inside", "a\r\nb\tc", "  x  y  ", "e\u0301"]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Paragraphs of a source file that every Python has, and texts at the borders."""
    source = Path(textwrap.__file__).read_text(encoding="utf-8")
    return [*source.split("\n\n"), *ODD_TEXTS]


@pytest.fixture(scope="session")
def train_bpe(texts: list[str]) -> Callable[..., Path]:
    """Train a byte-level BPE and save it as a Hugging Face folder."""

    def train(folder: Path, *, begins: bool, **config: Any) -> Path:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[BEGIN, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        if begins:
            bpe.post_processor = processors.TemplateProcessing(
                single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
            )
        folder.mkdir(parents=True)
        bpe.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return train


@pytest.fixture(scope="session")
def sentencepiece_model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "small"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "small.model"


@pytest.fixture(scope="session")
def tiktoken_ranks(
    train_bpe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Ranks as the engine's TikTokenizer reads them: the 256 bytes, then what was merged."""
    folder = train_bpe(tmp_path_factory.mktemp("ranks") / "bpe", begins=False)
    vocab = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    alphabet = dict(zip(_byte_characters(), range(256), strict=True))
    tokens = [token for token in sorted(vocab, key=vocab.__getitem__) if token not in (BEGIN, END)]
    merged = [bytes(map(alphabet.__getitem__, token)) for token in tokens if len(token) > 1]
    rows = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode(errors="replace"),
        }
        for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merged])
    ]
    path = folder / "ranks.json"
    path.write_text(json.dumps(rows))
    return path


def _byte_characters() -> str:
    """Characters that stand for bytes 0 to 255 in a byte-level BPE: shown ones for themselves."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in shown else next(others)) for byte in range(256))


@pytest.fixture(scope="session")
def engine_tokenizer() -> Callable[[TokenizerPlan], Any]:
    """Build the engine's own tokenizer from the same flags."""
    from megatron.core.tokenizers import MegatronTokenizer
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    def build(plan: TokenizerPlan) -> Any:
        if plan.tokenizer_type == "ByteLevelTokenizer":  # the engine has no flag for its library
            return MegatronTokenizer.from_pretrained(metadata_path={"library": "byte-level"})
        flags = SimpleNamespace(
            tokenizer_type=plan.tokenizer_type,
            tokenizer_model=plan.tokenizer_model,
            tokenizer_hf_no_include_special_tokens=not plan.include_special_tokens,
            tokenizer_hf_no_use_fast=False,
            tokenizer_sentencepiece_legacy=False,
            tokenizer_sentencepiece_ignore_extra_whitespaces=True,
            trust_remote_code=plan.trust_remote_code,
            chat_template=None,
            vocab_file=None,
            merge_file=None,
            special_tokens=(
                list(plan.special_tokens) if plan.tokenizer_type == "TikTokenizer" else None
            ),
            vocab_size=plan.vocab_size,
            tiktoken_pattern=plan.tiktoken_pattern,
            tiktoken_num_special_tokens=plan.tiktoken_num_special_tokens,
            metadata_path=None,
            pad_vocab_size=False,
        )
        return build_tokenizer(flags)

    return build
