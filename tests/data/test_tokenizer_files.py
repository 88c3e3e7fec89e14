import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from megatron_mlr1.data.documents import Frame
from megatron_mlr1.data.tokenizer_files import read_definition, read_facts

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
AS_SAVED = {
    "0": {
        "content": BEGIN, "lstrip": False, "normalized": False, "rstrip": False,
        "single_word": False, "special": True,
    },
    "1": {
        "content": END, "lstrip": False, "normalized": False, "rstrip": False,
        "single_word": False, "special": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bos_token": BEGIN, "model_max_length": 8, "clean_up_tokenization_spaces": True},
        {"bos_token": {"__type": "AddedToken", "content": BEGIN}, "pad_token": END},
        {"added_tokens_decoder": AS_SAVED, "additional_special_tokens": [BEGIN]},
        {"eos_token": None, "sep_token": END, "tokenizer_class": "TokenizersBackend"},
        {"eos_token": None},
    ],
    ids=str,
)
def test_facts_are_those_of_transformers(
    config: dict[str, Any], texts: list[str], train_bpe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True, **config)
    facts = read_facts(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert facts is not None
    assert facts.vocab_size == len(theirs)
    assert facts.bos == theirs.bos_token_id
    end = theirs.eos_token or theirs.sep_token
    assert facts.eod == (None if end is None else theirs.convert_tokens_to_ids(end))
    backend = Tokenizer.from_buffer(facts.definition.content)
    assert [backend.encode(text).ids for text in texts] == [
        theirs(text).input_ids for text in texts
    ]


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"tokenizer_class": "GPT2TokenizerFast"}, {}),
        ({"auto_map": {}}, {}),
        ({"add_bos_token": False}, {}),
        ({"split_special_tokens": True}, {}),
        ({"unk_token": "<new>"}, {}),
        ({"extra_special_tokens": ["def"]}, {}),
        ({"extra_special_tokens": {"image_token": "<image>"}}, {}),
        ({"added_tokens_decoder": AS_SAVED | {"2": AS_SAVED["1"] | {"content": "<new>"}}}, {}),
        ({"added_tokens_decoder": {"1": AS_SAVED["1"] | {"lstrip": True}}}, {}),
        ({}, {"special_tokens_map.json": "{}"}),
        ({}, {"added_tokens.json": "{}"}),
        ({}, {"config.json": '{"model_type": "qwen2"}'}),
    ],
    ids=str,
)
def test_what_may_touch_the_ids_is_left_to_transformers(
    config: dict[str, Any], files: dict[str, str], train_bpe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True, **config)
    for name, content in files.items():
        (folder / name).write_text(content)
    assert read_facts(folder) is None


TEMPLATES = [
    (None, Frame()),
    (processors.ByteLevel(), Frame()),
    (
        processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{BEGIN} {BEGIN} $A {END}",
                    special_tokens=[(BEGIN, 0), (END, 1)],
                ),
            ]
        ),
        Frame((0, 0), (1,)),
    ),
    (processors.RobertaProcessing((END, 1), (BEGIN, 0)), None),
]


@pytest.mark.parametrize(("template", "frame"), TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_constant_template_puts_the_same_ids_around_each_text(
    template: Any, frame: Frame | None, train_bpe: Callable[..., Path], tmp_path: Path
) -> None:
    backend = Tokenizer.from_file(str(train_bpe(tmp_path / "bpe", begins=False) / "tokenizer.json"))
    if template is not None:
        backend.post_processor = template
    definition = read_definition(backend.to_str().encode())
    assert definition.frame == frame
    if frame is not None:
        plain = backend.encode("some text", add_special_tokens=False).ids
        assert backend.encode("some text").ids == [*frame.before, *plain, *frame.after]


def test_truncation_and_padding_are_taken_out_of_a_definition(
    train_bpe: Callable[..., Path], tmp_path: Path
) -> None:
    content = (train_bpe(tmp_path / "bpe", begins=True) / "tokenizer.json").read_bytes()
    backend = Tokenizer.from_buffer(content)
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=9)
    definition = read_definition(backend.to_str().encode())
    assert json.loads(definition.content) == json.loads(content)
    assert read_definition(content).content == content
    assert definition.special_texts == (BEGIN, END)
