"""The tokenizer that goes with exported weights: its files, its ids and its chat template."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import AutoTokenizer

from megatron_mlr1.checkpoint.folder import fsync_folder, write_text
from megatron_mlr1.checkpoint.hugging_face import TokenIds
from megatron_mlr1.errors import CheckpointError

FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Every file that transformers may keep a tokenizer in."""
VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")
TEMPLATE: Final = Path(__file__).with_name("chat_template.jinja")

_ENDS: Final = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
"""What ends a text, a message to a tool or a turn; the published models stop at each."""
_HEADERS: Final = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What a model folder needs to know of its tokenizer."""

    folder: Path
    size: int
    """Tokens, added ones included."""
    ids: TokenIds
    needs_template: bool
    """Whether it has the tokens of Llama 3's headers, and no template of its own."""

    def copy(self, target: Path) -> None:
        """Copy its files into a model folder, and give it a chat template where it needs one."""
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, target / name)
        if self.needs_template:
            write_text(target / "chat_template.jinja", TEMPLATE.read_text("utf-8"))
        fsync_folder(target)


def holds_tokenizer(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer's files."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer with transformers, as whoever uses the exported model will.

    Raises:
        CheckpointError: the folder holds no tokenizer that transformers can load.
    """
    if not holds_tokenizer(folder):
        raise CheckpointError(
            f"{folder} holds no tokenizer: none of {', '.join(VOCABULARIES)} is there. Name the "
            "folder that the run used as --tokenizer-model."
        )
    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{folder} holds a tokenizer that transformers cannot load ({error}). Save it with "
            "save_pretrained, then name that folder."
        ) from error
    vocabulary: dict[str, int] = loaded.get_vocab()
    ends = [vocabulary[token] for token in _ENDS if token in vocabulary]
    return Tokenizer(
        folder=folder,
        size=len(loaded),
        ids=TokenIds(
            bos=loaded.bos_token_id, eos=ends if len(ends) == len(_ENDS) else loaded.eos_token_id
        ),
        needs_template=loaded.chat_template is None
        and loaded.bos_token is not None
        and all(token in vocabulary for token in _HEADERS),
    )
