"""What is known of a tokenizer before it makes ids: its vocabulary, its end, its digest."""

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import orjson

from megatron_mlr1.data.tokenizer_files import Definition, read_definition, read_facts
from megatron_mlr1.data.tokenizers import (
    ByteTokenizer,
    RustTokenizer,
    Tokenizer,
    TokenizerPlan,
    TransformersTokenizer,
    load_tokenizer,
)


@dataclass(frozen=True, slots=True)
class TokenizerIdentity:
    """What is known of the tokenizer of a plan."""

    vocab_size: int
    eod: int | None
    bos: int | None
    sha256: str
    """Of what decides the ids; see `identify`."""
    library: str
    """Which makes the ids where nothing faster does; empty for bytes."""
    definition: Definition | None
    """Where a `tokenizer.json` alone decides the ids."""

    @property
    def engine(self) -> str:
        """Name the library with its version."""
        return f"{self.library} {version(self.library)}" if self.library else "bytes"


def identify(plan: TokenizerPlan) -> TokenizerIdentity:
    """Find out what is known, without loading the tokenizer where its files say it all.

    The digest is of `tokenizer.json` of a folder, else of the file that the plan names, else, for
    a name on the hub, of the vocabulary; for bytes it is of the word `bytes`.

    Raises:
        ConfigError: the type is unknown, or its model is not named.
        DataError: its files are missing or damaged.
        MachineError: a package is missing.
    """
    if plan.tokenizer_type == "HuggingFaceTokenizer" and plan.tokenizer_model is not None:
        try:
            facts = read_facts(Path(plan.tokenizer_model))
        except (OSError, ValueError, KeyError):
            facts = None  # loading it says what is wrong
        if facts is not None:
            return TokenizerIdentity(
                facts.vocab_size, facts.eod, facts.bos, facts.sha256, "tokenizers", facts.definition
            )
    tokenizer = load_tokenizer(plan)
    definition = None
    if isinstance(tokenizer, RustTokenizer):
        definition = read_definition(tokenizer.backend.to_str().encode())
    return TokenizerIdentity(
        tokenizer.vocab_size,
        tokenizer.eod,
        tokenizer.bos,
        _sha256(plan, tokenizer),
        tokenizer.library,
        definition,
    )


def _sha256(plan: TokenizerPlan, tokenizer: Tokenizer) -> str:
    model = Path(plan.tokenizer_model or "")
    if isinstance(tokenizer, ByteTokenizer):
        content = b"bytes"
    elif (model / "tokenizer.json").is_file():
        content = (model / "tokenizer.json").read_bytes()
    elif model.is_file():
        content = model.read_bytes()
    elif isinstance(tokenizer, RustTokenizer):
        content = tokenizer.backend.to_str().encode()
    else:
        assert isinstance(tokenizer, TransformersTokenizer), "the others are made of one file"
        content = orjson.dumps(tokenizer.tokenizer.get_vocab(), option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(content).hexdigest()
