"""What a chat is: messages in turn, of which the assistant's are to be learned."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mlr1.data.texts import json_kind
from megatron_mlr1.errors import DataError

Message = dict[str, Any]
"""`role`, `content`, and `tool_calls` where the assistant calls a tool: what a template reads."""

FOLLOWS: Mapping[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool", "ipython"),
    "tool": ("assistant",),
    "ipython": ("assistant",),
}
"""Each role, and those that it may stand behind; None is the beginning."""


def check_messages(messages: Any) -> list[Message]:
    """Check a chat and keep what a template reads of it.

    A chat is a system message or none, then a user and an assistant in turn; the assistant has the
    last word. A tool (`tool`, or `ipython` as Llama 3 names it) answers an assistant's call.

    Args:
        messages: as a record holds them; keys beyond those of a `Message` are left behind.

    Raises:
        DataError: it is no such chat; says the reason alone, since only the caller knows the place.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("no messages: a chat is a list of {role, content}")
    checked: list[Message] = []
    for number, message in enumerate(messages, start=1):
        before = checked[-1] if checked else None
        checked.append(_check_message(message, before, f"message {number}"))
    if checked[-1]["role"] != "assistant":
        role = checked[-1]["role"]
        raise DataError(f"ends with a message of {role}: the last must be an assistant's")
    return checked


def _check_message(message: Any, before: Message | None, which: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{which} is {json_kind(message)} where {{role, content}} is needed")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in FOLLOWS:
        raise DataError(f"{which} has the role {role!r}; known are {', '.join(FOLLOWS)}")
    behind = None if before is None else before["role"]
    if behind not in FOLLOWS[role]:
        place = "comes first" if behind is None else f"stands behind one of {behind}"
        raise DataError(f"{which} is one of {role} and {place}: the roles are out of order")
    if role in ("tool", "ipython") and before is not None and "tool_calls" not in before:
        raise DataError(f"{which} answers a tool call that nobody made")
    calls = message.get("tool_calls")
    if role == "assistant" and calls:
        return {"role": role, "content": content or "", "tool_calls": _check_calls(calls, which)}
    if not isinstance(content, str):
        kind = "no" if content is None else f"{json_kind(content)} as its"
        raise DataError(f"{which} has {kind} content where text is needed")
    if not content.strip():
        raise DataError(f"{which}, of {role}, is empty")
    refuse_lone_surrogates(content, which)
    return {"role": role, "content": content}


def _check_calls(calls: Any, which: str) -> list[Any]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise DataError(f"{which} has {json_kind(calls)} as its tool_calls where a list is needed")
    if len(calls) != 1:
        raise DataError(f"{which} makes several tool calls; the model makes one in a turn")
    call = calls[0].get("function") if isinstance(calls[0], Mapping) else None
    name = call.get("name") if isinstance(call, Mapping) else None
    arguments = call.get("arguments") if isinstance(call, Mapping) else None
    if not isinstance(name, str) or not isinstance(arguments, str | Mapping):
        raise DataError(f"{which} has a tool call without a function's name and arguments")
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def refuse_lone_surrogates(text: str, which: str) -> None:
    """Refuse a string that is no text, though JSON can spell it.

    Raises:
        DataError: the string holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{which} holds half of a surrogate pair, which is no text") from error


def texts_of(messages: Sequence[Message]) -> list[str]:
    """List every string of a chat that a template may write, names of tools and roles apart."""
    found: list[str] = []
    under_way: list[Any] = [
        message[key] for message in messages for key in ("content", "tool_calls") if key in message
    ]
    while under_way:
        value = under_way.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Mapping):
            under_way += [*value.keys(), *value.values()]
        elif isinstance(value, Sequence):
            under_way += value
    return found
