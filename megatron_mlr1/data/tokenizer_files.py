"""The files of a Hugging Face tokenizer's folder, read without the library that wrote them.

Importing `transformers` and building its tokenizer takes seconds. Where the folder says nothing
that its class would act upon, `tokenizer.json` alone decides the ids, and the few facts beside
them can be read here. Everything else is left to `transformers`; the tests compare the two.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_mlr1.data.documents import Frame
from megatron_mlr1.data.texts import json_kind

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
PLAIN_MODELS = ("llama", "llama4", "llama4_text")
"""Model types beside a tokenizer that AutoTokenizer is known (and tested) to leave alone."""
NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
LISTED_TOKENS = ("additional_special_tokens", "extra_special_tokens")
HARMLESS = frozenset(
    {
        "tokenizer_class", "added_tokens_decoder", "backend", "chat_template", "is_local",
        "clean_up_tokenization_spaces", "model_input_names", "model_max_length", "name_or_path",
        "padding_side", "truncation_side", *NAMED_TOKENS, *LISTED_TOKENS,
    }
)  # fmt: skip
"""Keys of tokenizer_config.json that cannot touch the ids, if the tokens that they name are those
of tokenizer.json."""


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a tokenizer.json and the configuration beside it say."""

    definition: "Definition"
    vocab_size: int
    eod: int | None
    bos: int | None
    sha256: str
    """Of tokenizer.json as it is."""


@dataclass(frozen=True, slots=True)
class Definition:
    """What a `tokenizer.json` defines."""

    content: bytes
    """Of the file, without truncation and padding, which are for batches of a model."""
    special_texts: tuple[str, ...]
    """Texts that become one token wherever they stand."""
    frame: Frame | None
    """What the template puts around each text; None where that is not constant."""


def read_definition(content: bytes) -> Definition:
    """Read the content of a `tokenizer.json`.

    Raises:
        ValueError: it is no JSON.
    """
    return _definition(orjson.loads(content), content)


def _definition(parsed: dict[str, Any], content: bytes) -> Definition:
    if parsed.get("truncation") or parsed.get("padding"):
        content = orjson.dumps(parsed | {"truncation": None, "padding": None})
    special = tuple(token["content"] for token in parsed.get("added_tokens") or ())
    return Definition(content, special, _constant_frame(parsed.get("post_processor")))


def has_plain_class(folder: Path) -> bool:
    """Tell whether AutoTokenizer would build this local folder by `PreTrainedTokenizerFast`.

    Its choice depends on the class that the tokenizer names and on the model type beside it.
    """
    config_path, model_path = folder / "tokenizer_config.json", folder / "config.json"
    if not config_path.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    config = _read(config_path)
    return (
        config.get("tokenizer_class") in PLAIN_CLASSES
        and "auto_map" not in config
        and (not model_path.is_file() or _read(model_path).get("model_type") in PLAIN_MODELS)
    )


def read_facts(folder: Path) -> TokenizerFacts | None:
    """Read a folder whose `tokenizer.json` alone decides the ids; None where it may not be so.

    Raises:
        ValueError: a file is no JSON.
        KeyError, TypeError, AttributeError: something in it is not what it must be.
    """
    if not has_plain_class(folder):
        return None
    config = _read(folder / "tokenizer_config.json")
    content = (folder / "tokenizer.json").read_bytes()
    parsed = orjson.loads(content)
    if not isinstance(parsed, dict):
        raise ValueError(f"{folder / 'tokenizer.json'} holds {json_kind(parsed)}, no definition")
    added = {token["content"]: token for token in parsed.get("added_tokens") or ()}
    vocab = (parsed.get("model") or {}).get("vocab")
    if not isinstance(vocab, dict) or not _is_harmless(config, added, folder):
        return None
    ids = {content: token["id"] for content, token in added.items()}
    eod = _content(config.get("eos_token")) or _content(config.get("sep_token"))
    bos = _content(config.get("bos_token"))
    return TokenizerFacts(
        definition=_definition(parsed, content),
        vocab_size=len(vocab) + sum(token not in vocab for token in added),
        eod=ids[eod] if eod else None,
        bos=ids[bos] if bos else None,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _constant_frame(processor: Mapping[str, Any] | None) -> Frame | None:
    frames = []
    for step in _steps(processor):
        if step["type"] == "TemplateProcessing":
            frames.append(_frame_of_template(step))
        elif step["type"] != "ByteLevel":  # which moves offsets alone
            return None
    if len(frames) > 1:
        return None
    return frames[0] if frames else Frame()


def _frame_of_template(template: Mapping[str, Any]) -> Frame:
    sides: tuple[list[int], list[int]] = ([], [])
    side = 0
    for piece in template["single"]:
        if "Sequence" in piece:
            side = 1
        else:
            sides[side].extend(template["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return Frame(tuple(sides[0]), tuple(sides[1]))


def _steps(processor: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if processor is None:
        return ()
    if processor["type"] == "Sequence":
        return [step for inner in processor["processors"] for step in _steps(inner)]
    return (processor,)


def _is_harmless(config: Mapping[str, Any], added: Mapping[str, Any], folder: Path) -> bool:
    if not HARMLESS.issuperset(config):
        return False
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        # Only then are these files read; they may name further tokens.
        if any(
            (folder / name).exists() for name in ("special_tokens_map.json", "added_tokens.json")
        ):
            return False
    elif any(
        added.get(token["content"]) != {"id": int(number), **token}
        for number, token in decoder.items()
    ):
        return False
    named = [config[key] for key in NAMED_TOKENS if config.get(key) is not None]
    for key in LISTED_TOKENS:
        listed = config.get(key) or []
        if not isinstance(listed, list):
            return False
        named += listed
    # A token that the file does not hold as a special one would be added to it.
    return all(added.get(_content(token) or "", {}).get("special") for token in named)


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return content if isinstance(content, dict) else {}
