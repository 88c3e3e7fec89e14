"""Chats, and a small tokenizer with the tokens of Llama 3's headers."""

import json
import random
import textwrap
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's pattern."""
TEXT = Path(textwrap.__file__).read_text()


def write_tokenizer(folder: Path, *, words: str = WORDS, **config: Any) -> Path:
    """Train a byte-level BPE on a source file, and save it as a Hugging Face folder."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT.split("\n\n") + ["\n\n\n"] * 50, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
    } | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_lines(path: Path, records: list[Any]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Let user and assistant speak in turn."""
    spoken = [
        {"role": ("user", "assistant")[number % 2], "content": turn}
        for number, turn in enumerate(turns)
    ]
    return spoken if system is None else [{"role": "system", "content": system}, *spoken]


def random_chats(number: int, seed: int, longest: int = 400) -> list[list[dict[str, str]]]:
    """Cut chats of one to three turns each out of a text."""
    source = random.Random(seed)

    def piece() -> str:
        begin = source.randrange(len(TEXT) - longest)
        return "x" + TEXT[begin : begin + source.randrange(longest)]

    return [chat(*(piece() for _ in range(2 * source.randrange(1, 4)))) for _ in range(number)]
