import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_mlr1.data.agreement import encode_fast
from megatron_mlr1.data.inputs import find_units
from megatron_mlr1.data.records import read_lines
from megatron_mlr1.data.texts import TextBatch
from megatron_mlr1.data.tokenizer_identity import identify
from megatron_mlr1.data.tokenizers import TokenizerPlan, load_tokenizer

Encode = Callable[..., tuple[list[list[int]], set[str]]]


@pytest.fixture
def encode(texts: list[str], tmp_path: Path) -> Encode:
    """Encode a corpus in small batches; give the ids of each text and what made them."""

    def batches(path: Path) -> Iterator[TextBatch]:
        [unit] = find_units([str(path)])
        return read_lines(unit, ["text"], 0, 2000)

    def encode(plan: TokenizerPlan, **choices: Any) -> tuple[list[list[int]], set[str]]:
        path = tmp_path / "c.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        choices = {"workers": 2, "check_documents": 20} | choices
        answers = list(encode_fast(batches(path), plan, identify(plan), **choices))
        assert [text for answer in answers for text in answer.batch.all_texts()] == texts
        found = []
        for answer in answers:
            for index in range(answer.ids.lengths.size):
                ids = answer.ids.part(index, index + 1).flat.tolist()
                found.append([*answer.frame.before, *ids, *answer.frame.after])
        return found, {answer.engine.split()[0] for answer in answers}

    return encode


def plan_of(folder: Path, **choices: Any) -> TokenizerPlan:
    return TokenizerPlan(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder), **choices
    )


@pytest.mark.parametrize(
    ("include_special_tokens", "check_documents"), [(True, 0), (False, 20), (True, 10_000)]
)
def test_the_fast_tokenizer_is_used_where_it_agrees_and_the_template_is_kept(
    include_special_tokens: bool,
    check_documents: int,
    encode: Encode,
    texts: list[str],
    train_bpe: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True)
    plan = plan_of(folder, include_special_tokens=include_special_tokens)
    assert encode(plan, check_documents=check_documents) == (
        load_tokenizer(plan).encode(texts), {"gigatoken"},
    )  # fmt: skip
    assert caplog.messages == []


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WHOLE_WORD = {
    "id": 1000, "content": "wrap", "single_word": True, "lstrip": False, "rstrip": False,
    "normalized": False, "special": False,
}  # fmt: skip
REASONS: list[tuple[dict[str, Any], str]] = [
    (
        {"pre_tokenizer": {
            "type": "ByteLevel", "use_regex": False, "add_prefix_space": False, "trim_offsets": True
        }},
        r"it gives other ids than tokenizers for (the text '.*'|.*c\.jsonl:\d+)",
    ),
    ({"normalizer": {"type": "Lowercase"}}, "it cannot read this tokenizer"),
    (
        {"post_processor": {
            "type": "RobertaProcessing", "sep": ["<|end_of_text|>", 1],
            "cls": ["<|begin_of_text|>", 0], "trim_offsets": False, "add_prefix_space": False,
        }},
        "the template of this tokenizer does more",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), REASONS, ids=range(len(REASONS)))
def test_otherwise_the_ids_are_those_of_tokenizers_and_one_line_says_why(
    changes: dict[str, Any],
    reason: str,
    encode: Encode,
    texts: list[str],
    train_bpe: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=True)
    change(folder / "tokenizer.json", **changes)
    plan = plan_of(folder)
    with caplog.at_level(logging.WARNING):
        assert encode(plan, workers=1) == (load_tokenizer(plan).encode(texts), {"tokenizers"})
    [line] = caplog.messages
    assert line.startswith("gigatoken is not used: ")
    assert "\n" not in line
    assert re.search(reason, line)


def test_a_difference_in_the_input_is_found_and_its_place_told(
    encode: Encode,
    texts: list[str],
    train_bpe: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=False)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    # Behind so many tokens that no hard text is made of it; the input has the word, though.
    plain = WHOLE_WORD | {"single_word": False}
    others = [plain | {"id": 600 + n, "content": f"<{n}>"} for n in range(80)]
    change(folder / "tokenizer.json", added_tokens=[*added, *others, WHOLE_WORD | {"id": 680}])
    plan = plan_of(folder)
    with caplog.at_level(logging.WARNING):
        found, engines = encode(plan, check_documents=10_000)
    assert (found, engines) == (load_tokenizer(plan).encode(texts), {"tokenizers"})
    [line] = caplog.messages
    assert "it gives other ids than tokenizers for" in line
    assert "c.jsonl:" in line
