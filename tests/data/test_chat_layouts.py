import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mlr1.data.chat_layouts import LAYOUTS, detect, named, read_questions
from megatron_mlr1.errors import ConfigError, DataError
from tests.support.chats import chat

TULU = {"id": "x", "messages": chat("q", "a"), "source": "y"}
MATH = {
    "expected_answer": "4",
    "problem_type": "has_answer_extracted",
    "problem_source": "aops_c6_high_school_olympiads",
    "generation_model": "DeepSeek-R1",
    "pass_rate_72b_tir": "0.5",
    "problem": "q",
    "generated_solution": "a",
    "inference_mode": "cot",
}
SCIENCE = {"expected_answer": "B", "input": "q", "output": "a"}
CODE = {
    "question": "q",
    "r1_generation": "a",
    "qwq_critique": "c",
    "solution": "s",
    "judgement": "right",
    "pass_rate": "1.0",
    "dataset": "taco",
    "split": "train",
    "index": "17",
    "id": "1",
    "question_id": "7",
}


@pytest.mark.parametrize(
    ("record", "layout"),
    [
        (TULU, "messages"),
        (MATH, "open-math-reasoning"),
        (SCIENCE, "input-output"),
        (CODE, "open-code-reasoning-2"),
        ({"prompt": "q", "response": "a"}, "prompt-response"),
    ],
)
def test_each_published_layout_is_recognised_and_read(record: dict[str, Any], layout: str) -> None:
    found = detect(record, "here")
    assert found is LAYOUTS[layout]
    assert found.messages(record, {}) == chat("q", "a")


def test_a_question_that_is_a_dash_is_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    asked = [{"question_id": "7", "question": "looked up"}, {"question_id": "8", "question": "-"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    questions = read_questions(path)
    layout = LAYOUTS["open-code-reasoning-2"]
    assert layout.messages(CODE | {"question": "-"}, questions) == chat("looked up", "a")
    for missing in ("8", None):
        with pytest.raises(DataError, match="not among --questions"):
            layout.messages(CODE | {"question": "-", "question_id": missing}, questions)


@pytest.mark.parametrize("line", ["x", '{"question_id": "7"}', "[]"])
def test_a_file_of_questions_must_be_one(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question_id": "1", "question": "q"}\n' + line)
    with pytest.raises(DataError, match=r"questions.jsonl:2: needs"):
        read_questions(path)
    with pytest.raises(DataError, match="No such file"):
        read_questions(tmp_path / "none")


def test_unknown_columns_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(DataError, match=r"here: the columns a, text are of no known.*prompt"):
        detect({"text": 1, "a": 2}, "here")
    with pytest.raises(ConfigError, match="--layout x is none of messages"):
        named("x")


def test_a_record_without_a_column_is_refused() -> None:
    with pytest.raises(DataError, match="reads prompt and response, and response is missing"):
        named("prompt-response").messages({"prompt": "q", "response": None}, {})
