"""What is known of a tokenizer before it makes ids: its vocabulary, its end, its digest."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import orjson
import tokenizers

from megatron_mlr1.data.tokenizer_files import Definition, read_definition, read_facts
from megatron_mlr1.data.tokenizers import (
    ByteTokenizer,
    RustTokenizer,
    Tokenizer,
    TokenizerPlan,
    TransformersTokenizer,
    load_tokenizer,
)
from megatron_mlr1.errors import DataError


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
    file: Path | None = None
    """That `tokenizer.json`, where it is a file."""

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
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            facts = None  # loading it says what is wrong
        if facts is not None:
            return TokenizerIdentity(
                *(facts.vocab_size, facts.eod, facts.bos, facts.sha256),
                library="tokenizers",
                definition=facts.definition,
                file=Path(plan.tokenizer_model) / "tokenizer.json",
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


def loader(plan: TokenizerPlan, identity: TokenizerIdentity) -> Callable[[], Tokenizer]:
    """Give what loads the tokenizer that was identified, here or in another process.

    A file that alone decides the ids is not looked through again. What is given can be pickled,
    and raises what `load_tokenizer` does, or DataError where the file is another one by now.
    """
    if identity.file is None:
        return partial(load_tokenizer, plan)
    return partial(_load_file, plan, replace(identity, definition=None))


def _load_file(plan: TokenizerPlan, identity: TokenizerIdentity) -> Tokenizer:
    assert identity.file is not None, "it is for files alone"
    try:
        content = identity.file.read_bytes()
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception:  # the Rust library raises nothing narrower
        return load_tokenizer(plan)  # which says what is wrong
    if hashlib.sha256(content).hexdigest() != identity.sha256:
        raise DataError(f"{identity.file} was replaced while it was in use. Run again.")
    backend.no_truncation()
    backend.no_padding()
    return RustTokenizer(
        backend, identity.vocab_size, identity.eod, identity.bos, plan.include_special_tokens
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
