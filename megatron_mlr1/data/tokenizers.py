"""Text to ids: the tokenizers of Megatron-Core, by its names and with its ids, without its imports.

Each gives exactly the ids of `megatron.core.tokenizers` 0.19 for the same flags. Neither torch nor
Megatron is imported for that, except where `transformers.AutoTokenizer` itself imports torch.
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import orjson
import tokenizers

from megatron_mlr1.data.documents import Ids
from megatron_mlr1.data.inputs import missing_package
from megatron_mlr1.data.tokenizer_files import has_plain_class, read_facts
from megatron_mlr1.errors import ConfigError, DataError

TIKTOKEN_PATTERNS = {
    "v1": (r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),
    "v2": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How text is cut before merging, by the names of --tiktoken-pattern."""
TIKTOKEN_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
TIKTOKEN_VOCAB_SIZE = 2**17


class Tokenizer(Protocol):
    """What preprocessing needs; an implementation can be pickled, to be handed to a worker."""

    library: ClassVar[str]
    """The Python package that makes the ids; empty where it is this one."""

    @property
    def vocab_size(self) -> int:
        """Count the ids; decides the type of a token on the disk."""

    @property
    def eod(self) -> int | None:
        """Tell the id that ends a document, None where the tokenizer has none."""

    @property
    def bos(self) -> int | None:
        """Tell the id of the beginning of a text, None where the tokenizer has none."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the ids of each text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerPlan:
    """Which tokenizer, by Megatron's flags of the same names."""

    tokenizer_type: str
    tokenizer_model: str | None = None
    """A folder or a name on the Hugging Face hub, a SentencePiece model file, or a JSON list of the
    ranks of tiktoken."""
    vocab_size: int | None = None
    """Ids of the byte tokenizer and of tiktoken (None: 512 and 131,072, the engine's defaults)."""
    include_special_tokens: bool = True
    """Let a Hugging Face tokenizer add what its template adds, such as its beginning of text."""
    trust_remote_code: bool = False
    """Let a Hugging Face tokenizer run the Python code of its folder."""
    tiktoken_pattern: str = "v2"
    """How tiktoken cuts text before merging, one of `TIKTOKEN_PATTERNS`."""
    tiktoken_num_special_tokens: int = 1000
    """Ids before the ranks of tiktoken."""
    special_tokens: tuple[str, ...] = TIKTOKEN_SPECIAL
    """Texts of the first of those ids; the rest have made-up ones."""


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

    library: ClassVar[str] = ""
    vocab_size: int = 512
    eod: int | None = 0
    bos: int | None = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the bytes of each text."""
        return [list(text.encode()) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> Ids:
        """Give the same as arrays."""
        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return Ids(np.frombuffer(b"".join(encoded), np.uint8), lengths)


@dataclass(frozen=True, slots=True)
class SentencePieceTokenizer:
    """A SentencePiece model; the engine's `SentencePieceTokenizer` with its default flags."""

    library: ClassVar[str] = "sentencepiece"
    processor: Any
    vocab_size: int
    eod: int | None
    bos: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the ids of each text, without beginning or end."""
        ids: list[list[int]] = self.processor.encode(list(texts), out_type=int, num_threads=1)
        return ids


@dataclass(frozen=True, slots=True)
class RustTokenizer:
    """A Hugging Face tokenizer that is its `tokenizers` backend and nothing more."""

    library: ClassVar[str] = "tokenizers"
    backend: tokenizers.Tokenizer
    vocab_size: int
    eod: int | None
    bos: int | None
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

    library: ClassVar[str] = "transformers"
    tokenizer: Any
    vocab_size: int
    eod: int | None
    bos: int | None
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


@dataclass(frozen=True, slots=True)
class TikTokenizer:
    """Ranks of tiktoken behind special ids; the engine's tokenizer of this name."""

    library: ClassVar[str] = "tiktoken"
    encoding: Any
    vocab_size: int
    eod: int | None
    bos: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the ids of each text; the text of a special token becomes that token."""
        return [self.encoding.encode(text, allowed_special="all") for text in texts]


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
    eos, bos = (token if token >= 0 else None for token in (processor.eos_id(), processor.bos_id()))
    return SentencePieceTokenizer(processor, processor.get_piece_size(), eos, bos)


def _load_tiktoken(plan: TokenizerPlan) -> Tokenizer:
    try:
        import tiktoken
    except ImportError as error:
        raise missing_package(error, plan.tokenizer_type) from error
    model = _model(plan, "a JSON list of ranks")
    vocab_size = TIKTOKEN_VOCAB_SIZE if plan.vocab_size is None else plan.vocab_size
    num_special = plan.tiktoken_num_special_tokens
    _refuse_tiktoken_flags(plan, vocab_size)
    try:
        rows = orjson.loads(Path(model).read_bytes())[: vocab_size - num_special]
        ranks = {base64.b64decode(row["token_bytes"]): num_special + row["rank"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--tokenizer-model {model} is no JSON list of ranks ({error}). Name a file with rows "
            'of "rank", "token_bytes" (base64) and "token_str".'
        ) from error
    if [*ranks.values()] != [*range(num_special, vocab_size)]:
        raise DataError(
            f"--tokenizer-model {model}: the first {vocab_size - num_special} ranks do not count "
            f"up from 0 with different bytes ({len(ranks)} do). Mend --vocab-size or the file."
        )
    if any(ranks.get(bytes([byte])) != num_special + byte for byte in range(256)):
        raise DataError(
            f"--tokenizer-model {model}: the first 256 ranks are not the bytes in their order. "
            "Mend the file."
        )
    special = [*plan.special_tokens]
    special += [f"<SPECIAL_{number}>" for number in range(len(special), num_special)]
    encoding = tiktoken.Encoding(
        name=Path(model).stem,
        pat_str=TIKTOKEN_PATTERNS[plan.tiktoken_pattern],
        mergeable_ranks=ranks,
        special_tokens={text: number for number, text in enumerate(special)},
    )
    return TikTokenizer(encoding, vocab_size, special.index("</s>"), special.index("<s>"))


def _refuse_tiktoken_flags(plan: TokenizerPlan, vocab_size: int) -> None:
    if plan.tiktoken_pattern not in TIKTOKEN_PATTERNS:
        raise ConfigError(
            f"--tiktoken-pattern {plan.tiktoken_pattern} is not one of "
            f"{', '.join(TIKTOKEN_PATTERNS)}. Choose one of these."
        )
    missing = [text for text in TIKTOKEN_SPECIAL if text not in plan.special_tokens]
    if missing or len(set(plan.special_tokens)) < len(plan.special_tokens):
        raise ConfigError(
            f"--tokenizer-special-tokens must hold each of {' '.join(TIKTOKEN_SPECIAL)} and no "
            "text twice. Mend the list."
        )
    if not len(plan.special_tokens) <= plan.tiktoken_num_special_tokens < vocab_size:
        raise ConfigError(
            f"--tiktoken-num-special-tokens is {plan.tiktoken_num_special_tokens}; it must hold "
            f"the {len(plan.special_tokens)} special tokens and be less than --vocab-size "
            f"{vocab_size}. Mend one of them."
        )


def _load_hugging_face(plan: TokenizerPlan) -> Tokenizer:
    model = _model(plan, "a tokenizer's folder or its name on the Hugging Face hub")
    try:
        facts = read_facts(Path(model))
        if facts is not None:
            backend = tokenizers.Tokenizer.from_buffer(facts.definition.content)
            return RustTokenizer(
                backend, facts.vocab_size, facts.eod, facts.bos, plan.include_special_tokens
            )
        loaded = _load_with_transformers(model, plan.trust_remote_code)
    except Exception as error:  # the Rust library raises nothing narrower
        raise not_loaded(model, error) from error
    eod, bos = (
        None if token is None else loaded.convert_tokens_to_ids(token)
        for token in (loaded.eos_token or loaded.sep_token, loaded.bos_token)
    )
    # A subclass may add to the call; and pickling the backend forgets `encode_special_tokens`.
    if not _is_its_backend(loaded):
        return TransformersTokenizer(loaded, len(loaded), eod, bos, plan.include_special_tokens)
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return RustTokenizer(backend, len(loaded), eod, bos, plan.include_special_tokens)


def not_loaded(model: str, error: Exception) -> DataError:
    """Say why the files of a Hugging Face tokenizer cannot be used."""
    why = (str(error).strip() or "no reason is given").splitlines()[0].rstrip(".")
    if isinstance(error, AttributeError | KeyError | TypeError | IndexError):
        why = f"a file of it is not as it must be ({type(error).__name__}: {why})"
    return DataError(
        f"--tokenizer-model {model} cannot be loaded: {why}. "
        "Name a folder with tokenizer.json and tokenizer_config.json, or a hub name."
    )


def _load_with_transformers(model: str, trust_remote_code: bool) -> Any:
    if has_plain_class(Path(model)):
        # What AutoTokenizer would choose, without the torch that importing it brings.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(model)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)


def _is_its_backend(loaded: Any) -> bool:
    from transformers import PreTrainedTokenizerFast

    return type(loaded) is PreTrainedTokenizerFast and not loaded.split_special_tokens


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
    "TikTokenizer": _load_tiktoken,
    "ByteLevelTokenizer": _load_byte_tokenizer,
}
