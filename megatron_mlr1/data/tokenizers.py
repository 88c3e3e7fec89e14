"""Text to ids: the tokenizers of Megatron-Core, by its names and with its ids, without its imports.

Each gives exactly the ids of `megatron.core.tokenizers` 0.19 for the same flags. Neither torch nor
Megatron is imported for that, except where `transformers.AutoTokenizer` itself imports torch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from megatron_mlr1.errors import ConfigError, DataError


class Tokenizer(Protocol):
    """What preprocessing needs; an implementation can be pickled, to be handed to a worker."""

    @property
    def vocab_size(self) -> int:
        """Count the ids; decides the type of a token on the disk."""

    @property
    def eod(self) -> int | None:
        """Tell the id that ends a document, None where the tokenizer has none."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the ids of each text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerPlan:
    """Which tokenizer, by Megatron's flags of the same names."""

    tokenizer_type: str
    tokenizer_model: str | None = None
    """A folder or a name on the Hugging Face hub, or a SentencePiece model file."""
    vocab_size: int | None = None
    """Ids of the byte tokenizer (None: 512, the engine's default)."""
    include_special_tokens: bool = True
    """Let a Hugging Face tokenizer add what its template adds, such as its beginning of text."""
    trust_remote_code: bool = False
    """Let a Hugging Face tokenizer run the Python code of its folder."""


def load_tokenizer(plan: TokenizerPlan) -> Tokenizer:
    """Load the tokenizer that the plan names.

    Raises:
        ConfigError: the type is unknown, or its model is not named.
        DataError: its files are missing or damaged.
    """
    load = LOADERS.get(plan.tokenizer_type)
    if load is None:
        raise ConfigError(
            f"--tokenizer-type {plan.tokenizer_type} is not one of {', '.join(LOADERS)}. "
            "Choose one of these."
        )
    return load(plan)


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """One id for each byte of UTF-8; the engine's `ByteLevelTokenizer` (library `byte-level`).

    The engine ends a document with id 0, which is also the byte NUL.
    """

    vocab_size: int = 512
    eod: int | None = 0

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the bytes of each text."""
        return [list(text.encode()) for text in texts]


@dataclass(frozen=True, slots=True)
class SentencePieceTokenizer:
    """A SentencePiece model; the engine's `SentencePieceTokenizer` with its default flags."""

    processor: Any
    vocab_size: int
    eod: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the ids of each text, without beginning or end."""
        ids: list[list[int]] = self.processor.encode(list(texts), out_type=int, num_threads=1)
        return ids


@dataclass(frozen=True, slots=True)
class RustTokenizer:
    """A Hugging Face tokenizer that is its `tokenizers` backend and nothing more."""

    backend: tokenizers.Tokenizer
    vocab_size: int
    eod: int | None
    include_special_tokens: bool

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the ids of each text, with what the template adds where that is wanted."""
        encodings = self.backend.encode_batch_fast(
            list(texts), add_special_tokens=self.include_special_tokens
        )
        return [encoding.ids for encoding in encodings]


@dataclass(frozen=True, slots=True)
class TransformersTokenizer:
    """A Hugging Face tokenizer whose class may have a say in the ids: asked as the engine asks."""

    tokenizer: Any
    vocab_size: int
    eod: int | None
    include_special_tokens: bool

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the ids of each text, with what the template adds where that is wanted."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        if self.include_special_tokens:
            ids: list[int] = self.tokenizer(text).input_ids
        else:
            ids = self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text))
        return ids


def _load_byte_tokenizer(plan: TokenizerPlan) -> Tokenizer:
    vocab_size = 512 if plan.vocab_size is None else plan.vocab_size
    if vocab_size < 256:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small for {plan.tokenizer_type}; "
            "bytes need at least 256 ids."
        )
    return ByteTokenizer(vocab_size)


def _load_sentencepiece(plan: TokenizerPlan) -> Tokenizer:
    import sentencepiece

    model = _model(plan, "a SentencePiece model file")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(model)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"--tokenizer-model {model} is no SentencePiece model: {error}. Name its .model file."
        ) from error
    eos = processor.eos_id()
    return SentencePieceTokenizer(processor, processor.get_piece_size(), eos if eos >= 0 else None)


def _load_hugging_face(plan: TokenizerPlan) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    model = _model(plan, "a tokenizer's folder or its name on the Hugging Face hub")
    try:
        if _is_plain_backend(Path(model)):
            # What AutoTokenizer would choose, without the torch that importing it brings.
            loaded = PreTrainedTokenizerFast.from_pretrained(model)
        else:
            from transformers import AutoTokenizer

            loaded = AutoTokenizer.from_pretrained(model, trust_remote_code=plan.trust_remote_code)
    except Exception as error:  # the Rust library raises nothing narrower
        raise DataError(
            f"--tokenizer-model {model} cannot be loaded: {str(error).splitlines()[0]} "
            "Name a folder with tokenizer.json and tokenizer_config.json, or a hub name."
        ) from error
    eod_token = loaded.eos_token or loaded.sep_token
    eod = None if eod_token is None else loaded.convert_tokens_to_ids(eod_token)
    # A subclass may add to the call; and pickling the backend forgets `encode_special_tokens`.
    if type(loaded) is not PreTrainedTokenizerFast or loaded.split_special_tokens:
        return TransformersTokenizer(loaded, len(loaded), eod, plan.include_special_tokens)
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return RustTokenizer(backend, len(loaded), eod, plan.include_special_tokens)


def _is_plain_backend(folder: Path) -> bool:
    """Tell whether AutoTokenizer would build this local folder by `PreTrainedTokenizerFast`.

    Its choice depends on the class that the tokenizer names and on the model type beside it; the
    types here are those that it is known (and tested) to leave alone.
    """
    config_path = folder / "tokenizer_config.json"
    if not config_path.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    config = json.loads(config_path.read_text(encoding="utf-8"))
    model_path = folder / "config.json"
    model_type = None
    if model_path.is_file():
        model_type = json.loads(model_path.read_text(encoding="utf-8")).get("model_type")
    return (
        config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
        and "auto_map" not in config
        and (not model_path.is_file() or model_type in ("llama", "llama4", "llama4_text"))
    )


def _model(plan: TokenizerPlan, what: str) -> str:
    if plan.tokenizer_model is None:
        raise ConfigError(
            f"--tokenizer-type {plan.tokenizer_type} needs {what}. Name it with --tokenizer-model."
        )
    return plan.tokenizer_model


LOADERS: dict[str, Callable[[TokenizerPlan], Tokenizer]] = {
    "HuggingFaceTokenizer": _load_hugging_face,
    "SentencePieceTokenizer": _load_sentencepiece,
    "GPTSentencePieceTokenizer": _load_sentencepiece,
    "Llama2Tokenizer": _load_sentencepiece,
    "ByteLevelTokenizer": _load_byte_tokenizer,
}
