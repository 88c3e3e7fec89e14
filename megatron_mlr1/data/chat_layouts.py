"""How published sets of chats lay out a record, and the chat that a record is.

The columns are those of the sets' cards on the Hugging Face hub: `allenai/tulu-3-sft-mixture` and
`allenai/tulu-3-sft-olmo-2-mixture-0225` (id, messages, source), `nvidia/OpenMathReasoning`
(problem, generated_solution, expected_answer, ...), `nvidia/OpenScienceReasoning-2` (input,
output, expected_answer) and `nvidia/OpenCodeReasoning-2` (question, r1_generation, qwq_critique,
solution, judgement, pass_rate, ..., question_id).

The question of OpenCodeReasoning-2 is a dash: the card asks to look it up in TACO, APPS,
CodeContests or open-r1/codeforces. NeMo-Skills does that in
`recipes/opencodereasoning/scripts/prepare_questions.py` and writes JSON lines with `question_id`
and `question`; `read_questions` takes that file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

from megatron_mlr1.data.chat import Message, check_messages
from megatron_mlr1.errors import ConfigError, DataError

Record = Mapping[str, Any]
Questions = Mapping[str, str]
"""The question of each `question_id`."""

ASKED_ELSEWHERE = "-"
"""What stands in OpenCodeReasoning-2 where the question is another data set's."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns of a record make its chat."""

    name: str
    columns: tuple[str, ...]
    """What a record must have, and what is read of a table; more are read where they are named."""
    optional: tuple[str, ...]
    """What is read where it is there."""
    read: Callable[[Record, Questions], Any]
    """The messages of a record, not yet checked."""

    def messages(self, record: Record, questions: Questions) -> list[Message]:
        """Give the chat of a record.

        Raises:
            DataError: a column is missing, or it is no chat; says the reason alone.
        """
        missing = [column for column in self.columns if record.get(column) is None]
        if missing:
            raise DataError(
                f"the layout {self.name} reads {' and '.join(self.columns)}, and {missing[0]} is "
                f"missing; the record has {', '.join(sorted(record)) or 'nothing'}"
            )
        return check_messages(self.read(record, questions))


def _pair(question: str, answer: str) -> Callable[[Record, Questions], Any]:
    def read(record: Record, questions: Questions) -> Any:
        return [
            {"role": "user", "content": record[question]},
            {"role": "assistant", "content": record[answer]},
        ]

    return read


def _code(record: Record, questions: Questions) -> Any:
    question = record["question"]
    if question == ASKED_ELSEWHERE:
        number = record.get("question_id")
        if not isinstance(number, str) or number not in questions:
            raise DataError("its question is '-', and its question_id is not among --questions")
        question = questions[number]
    return _pair("question", "answer")(
        {"question": question, "answer": record["r1_generation"]}, questions
    )


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            Layout("messages", ("messages",), (), lambda record, questions: record["messages"]),
            Layout(
                "open-math-reasoning",
                ("problem", "generated_solution"),
                (),
                _pair("problem", "generated_solution"),
            ),
            Layout("open-code-reasoning-2", ("question", "r1_generation"), ("question_id",), _code),
            Layout("prompt-response", ("prompt", "response"), (), _pair("prompt", "response")),
            Layout("input-output", ("input", "output"), (), _pair("input", "output")),
        )
    }
)
"""By name, in the order in which they are tried. Tulu 3 is `messages`, OpenScienceReasoning-2 is
`input-output`."""


def detect(columns: Mapping[str, Any], where: str) -> Layout:
    """Find the layout of a file by the columns of its first record.

    Args:
        columns: that record, or a table's columns.
        where: its place, for the message.

    Raises:
        DataError: no layout has these columns.
    """
    for layout in LAYOUTS.values():
        if all(column in columns for column in layout.columns):
            return layout
    known = "; ".join(f"{name}: {', '.join(row.columns)}" for name, row in LAYOUTS.items())
    raise DataError(
        f"{where}: the columns {', '.join(sorted(columns))} are of no known layout ({known}). "
        "Rename the columns, or write the chats as `messages`."
    )


def named(name: str) -> Layout:
    """Give the layout that somebody named.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"--layout {name} is none of {', '.join(LAYOUTS)}. Choose one of these.")
    return LAYOUTS[name]


def read_questions(path: Path) -> dict[str, str]:
    """Read the questions of OpenCodeReasoning-2: JSON lines with `question_id` and `question`.

    Raises:
        DataError: the file cannot be read, or a line lacks one of the two.
    """
    questions: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = orjson.loads(line)
                    key, question = record["question_id"], record["question"]
                except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{path}:{number}: needs a JSON object with question_id and question. "
                        "Write the file again."
                    ) from error
                if isinstance(question, str) and question != ASKED_ELSEWHERE:
                    questions[str(key)] = question
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Name a file of questions.") from error
    return questions
