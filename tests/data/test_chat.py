from typing import Any

import pytest

from megatron_mlr1.data.chat import check_messages, texts_of
from megatron_mlr1.errors import DataError
from tests.support.chats import chat

CALL = {"function": {"name": "add", "arguments": {"a": 1, "b": "<x>"}}}


@pytest.mark.parametrize(
    "messages", [chat("q", "a"), chat("q", "a", "q", "a"), chat("q", "a", system="s")]
)
def test_user_and_assistant_in_turn_are_a_chat(messages: list[dict[str, str]]) -> None:
    assert check_messages(messages) == messages


def test_what_no_template_reads_is_left_behind() -> None:
    table = [message | {"tool_calls": None, "name": None, "id": 3} for message in chat("q", "a")]
    assert check_messages(table) == chat("q", "a")


def test_a_tool_answers_a_call() -> None:
    messages = [
        *chat("q"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    checked = check_messages(messages)
    assert checked[1]["tool_calls"][0]["function"] == CALL["function"]
    written = [
        "q",
        "function",
        "add",
        "type",
        "function",
        "name",
        "arguments",
        "a",
        "b",
        "<x>",
        "3",
        "3",
    ]
    assert sorted(texts_of(checked)) == sorted(["", *written])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "no messages"),
        ([], "no messages"),
        ("text", "no messages"),
        (["text"], "message 1 is a str"),
        (chat("q"), "ends with a message of user"),
        (chat("q", "a", "q"), "ends with a message of user"),
        ([*chat("q", "a")[1:]], "message 1 is one of assistant and comes first"),
        ([*chat("q"), *chat("q", "a")], "message 2 is one of user and stands behind one of user"),
        ([*chat("q", "a"), {"role": "system", "content": "s"}], "message 3 is one of system"),
        ([{"role": "gpt", "content": "q"}], "the role 'gpt'"),
        ([{"content": "q"}], "the role None"),
        (chat("q", " \n"), "message 2, of assistant, is empty"),
        (chat("q", "a", system=""), "message 1, of system, is empty"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a list as its content"),
        (chat("q", "\ud800"), "half of a surrogate pair"),
        ([*chat("q", "a"), {"role": "tool", "content": "3"}], "a tool call that nobody made"),
        (
            [*chat("q"), {"role": "assistant", "tool_calls": [CALL, CALL]}],
            "makes several tool calls",
        ),
        (
            [*chat("q"), {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}],
            "without a function's name and arguments",
        ),
    ],
    ids=str,
)
def test_what_is_no_chat_is_refused_with_its_reason(messages: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        check_messages(messages)


@pytest.mark.parametrize("role", [[], {}, None, 3])
def test_a_role_that_is_no_text_is_refused(role: object) -> None:
    with pytest.raises(DataError, match="message 1 has the role"):
        check_messages([{"role": role, "content": "a"}])
