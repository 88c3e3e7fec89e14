"""Chats to ids by the model's chat template, and which of the ids are to be learned.

A chat is rendered by `transformers` itself and tokenized in one piece, so its ids are those of
`tokenizer.apply_chat_template(messages, tokenize=True)`. What the assistant said is found by
rendering the chat up to each of its turns: the text up to the generation prompt, and the text up
to the end of the turn, must both be beginnings of the whole text, and their ids beginnings of its
ids. So a trained token is one that the model would have to write itself after exactly the ids that
it will be given; a chat for which that cannot be had is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.chat import Message, texts_of
from megatron_mlr1.data.chat_engine import CheckedEncoder
from megatron_mlr1.data.index import token_dtype
from megatron_mlr1.data.tokenizers import not_loaded
from megatron_mlr1.errors import ConfigError, DataError

TRAIN_ON = ("assistant", "last", "all")
"""What is learned: every turn of the assistant, its last one, or every token of the chat."""

LLAMA_TEMPLATE = Path(__file__).parents[1] / "checkpoint" / "chat_template.jinja"
"""The template of MobileLLM-R1, for its tokenizer without one: Llama 3's headers."""
LLAMA_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

Ids = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class TokenizedChat:
    """A chat of T tokens."""

    ids: Ids
    """(T,)"""
    trained: NDArray[np.uint8]
    """(T,): 1 where the token is a target of training. An answer and the token that ends its turn
    are; the header before it is not."""


@dataclass(frozen=True, slots=True)
class _Rendered:
    text: str
    cuts: tuple[int, ...]
    """Where what is learned begins and ends, in turn, in characters."""

    def pieces(self) -> list[str]:
        """Cut the text there; what is behind the last cut is left out, and so is the piece before
        it where nothing is behind: both follow from the others.
        """
        cuts = self.cuts[:-1] if self.cuts and self.cuts[-1] == len(self.text) else self.cuts
        return [self.text[a:b] for a, b in zip((0, *cuts), cuts, strict=False)]


class ChatTokenizer:
    """A tokenizer with its chat template; neither torch nor a model is needed."""

    def __init__(self, tokenizer: Any, train_on: str, add_template: str | None) -> None:
        """Take a loaded tokenizer of `transformers`.

        Args:
            tokenizer: a `PreTrainedTokenizerFast`.
            train_on: one of `TRAIN_ON`.
            add_template: template to give it; None: it has its own.
        """
        self.tokenizer = tokenizer
        self.train_on = train_on
        if add_template is not None:
            tokenizer.chat_template = add_template
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self.dtype = token_dtype(len(tokenizer))
        special = [row.content for row in tokenizer.added_tokens_decoder.values() if row.special]
        self.encoder = CheckedEncoder(backend, special)
        # All of Llama's begin alike, and looking for that is much faster than the pattern.
        alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*special, strict=False))
        self._opening = "".join(letters[0] for letters in alike)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def tokenize(self, chats: Sequence[Sequence[Message]]) -> list[TokenizedChat | DataError]:
        """Tokenize chats that `check_messages` let pass.

        Returns:
            for each chat its tokens, or why it cannot be had.
        """
        rendered = [self._render_or_refuse(chat) for chat in chats]
        kept = [row for row in rendered if isinstance(row, _Rendered)]
        texts = [text for row in kept for text in (row.text, *row.pieces())]
        encoded = iter(self.encoder.encode(texts))
        return [
            row
            if isinstance(row, DataError)
            else self._mark(next(encoded), [next(encoded) for _ in row.pieces()])
            for row in rendered
        ]

    def _mark(self, ids: Ids, pieces: list[Ids]) -> TokenizedChat | DataError:
        """Find the stretches to be learned: behind every odd piece, to the end of the even one."""
        trained = np.full(ids.size, self.train_on == "all", np.uint8)
        place = 0
        for number, piece in enumerate(pieces):
            if not np.array_equal(ids[place : place + piece.size], piece):
                return DataError("a token reaches over the border between a header and an answer")
            trained[place : place + piece.size] = number % 2
            place += piece.size
        if pieces:
            trained[place:] = len(pieces) % 2
        if not trained.any():
            return DataError("its answers have no token")
        return TokenizedChat(ids, trained)

    def _render_or_refuse(self, messages: Sequence[Message]) -> _Rendered | DataError:
        try:
            self._refuse_special_text(messages)
            return self._render(list(messages))
        except DataError as error:
            return error

    def _render(self, messages: list[Message]) -> _Rendered:
        text = self._text(messages, ask=False)
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = {"all": [], "last": turns[-1:], "assistant": turns}[self.train_on]
        cuts: list[int] = []
        for turn in chosen:
            before = self._text(messages[:turn], ask=True)
            up_to = text if turn == turns[-1] else self._text(messages[: turn + 1], ask=False)
            # A line end behind the token that ends the turn belongs to the template.
            up_to = up_to.rstrip() or up_to
            if not (text.startswith(before) and text.startswith(up_to) and before < up_to):
                raise DataError(
                    f"the chat template writes message {turn + 1} otherwise once others follow, so "
                    "its tokens cannot be marked; --train-on last can"
                )
            cuts += (len(before), len(up_to))
        return _Rendered(text, tuple(cuts))

    def _text(self, messages: list[Message], *, ask: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses it: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Whatever the template computes with a message that it did not expect.
            kind = type(error).__name__
            raise DataError(f"the chat template fails at it: {kind}: {error}") from error
        return text

    def _refuse_special_text(self, messages: Sequence[Message]) -> None:
        """Refuse a chat whose text would be read as the end of a turn or as a header.

        Raises:
            DataError: a special token is spelled out in a message.
        """
        for text in texts_of(messages):
            if self._opening in text and (found := self._special.search(text)):
                raise DataError(
                    f"a message spells out {found[0]}, which would become that special token"
                )


def load_chat_tokenizer(model: str, train_on: str) -> ChatTokenizer:
    """Load the tokenizer of a folder (or of a name on the hub) with its chat template.

    A tokenizer with the tokens of Llama 3's headers and no template of its own gets
    `LLAMA_TEMPLATE`, as an exported model does.

    Raises:
        ConfigError: there is no template, or `train_on` is unknown.
        DataError: the tokenizer cannot be loaded.
    """
    from transformers import PreTrainedTokenizerFast

    if train_on not in TRAIN_ON:
        raise ConfigError(f"--train-on {train_on} is none of {', '.join(TRAIN_ON)}.")
    try:
        loaded: Any = PreTrainedTokenizerFast.from_pretrained(model)
    except Exception as error:  # the Rust library raises nothing narrower
        raise not_loaded(model, error) from error
    if loaded.chat_template is not None:
        return ChatTokenizer(loaded, train_on, None)
    vocabulary = loaded.get_vocab()
    if loaded.bos_token is None or any(token not in vocabulary for token in LLAMA_HEADERS):
        raise ConfigError(
            f"--tokenizer-model {model} has no chat template, and not the tokens of Llama 3's "
            f"headers ({', '.join(LLAMA_HEADERS)}) and its beginning of text, with which it could "
            "have ours. Put a chat_template.jinja into the folder."
        )
    return ChatTokenizer(loaded, train_on, LLAMA_TEMPLATE.read_text("utf-8"))
