"""Tokenizers travel with the weights, and Llama 3's get the chat template of MobileLLM-R1."""

import shutil
from pathlib import Path

import jinja2
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_mlr1.checkpoint.hugging_face import TokenIds
from megatron_mlr1.checkpoint.tokenizer import read_tokenizer
from megatron_mlr1.errors import CheckpointError

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def header(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


@pytest.fixture
def copied(tokenizer_folder: Path, tmp_path: Path) -> PreTrainedTokenizerFast:
    read_tokenizer(tokenizer_folder).copy(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_ids_are_all_that_end_a_text(tokenizer_folder: Path) -> None:
    tokenizer = read_tokenizer(tokenizer_folder)
    assert tokenizer.size == 300
    loaded = AutoTokenizer.from_pretrained(tokenizer_folder)
    ends = loaded.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    assert tokenizer.ids == TokenIds(loaded.bos_token_id, ends)


def test_the_copy_is_the_same_tokenizer(
    tokenizer_folder: Path, copied: PreTrainedTokenizerFast
) -> None:
    original = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = "naïve 東京 <|eot_id|>"
    assert copied.encode(text) == original.encode(text)
    assert copied.decode(copied.encode(text)) == text


def test_a_chat_begins_with_the_prompt_of_the_published_models(
    copied: PreTrainedTokenizerFast,
) -> None:
    chat = [{"role": "user", "content": " 1 + 1? "}]
    text = copied.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|>"
        + header("system", SYSTEM)
        + header("user", "1 + 1?")
        + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_prompt_of_ones_own_replaces_it(copied: PreTrainedTokenizerFast) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi."},
    ]
    text = copied.apply_chat_template(chat, tokenize=False)
    assert text == "<|begin_of_text|>" + "".join(
        header(turn["role"], turn["content"]) for turn in chat
    )


def test_one_tool_call_in_a_turn_is_written_and_more_are_refused(
    copied: PreTrainedTokenizerFast,
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat: list[dict[str, object]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": {"sum": 1}},
    ]
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    text = copied.apply_chat_template(chat, tools=[tool], tokenize=False)
    assert header("assistant", '{"name": "add", "parameters": {"a": 1}}') in text
    assert text.endswith(header("ipython", '{"sum": 1}'))
    assert '"name": "add"' in text.split("<|eot_id|>")[0]
    chat[1]["tool_calls"] = [call, call]
    with pytest.raises(jinja2.TemplateError, match="one tool call"):
        copied.apply_chat_template(chat, tokenize=False)


def test_a_template_of_its_own_is_kept(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "own")
    (tmp_path / "copy").mkdir()
    read_tokenizer(tmp_path / "own").copy(tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert copy.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_a_tokenizer_without_llamas_tokens_gets_no_template(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    backend = AutoTokenizer.from_pretrained(tokenizer_folder).backend_tokenizer
    text = backend.to_str().replace("<|start_header_id|>", "<|header|>")
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(backend).from_str(text), eos_token="<|end_of_text|>"
    )
    other.save_pretrained(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    assert not tokenizer.needs_template
    assert tokenizer.ids.bos is None


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        read_tokenizer(tmp_path)
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot load"):
        read_tokenizer(tmp_path)
