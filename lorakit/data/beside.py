"""What stands beside the messages of a chat in a row: a system prompt, tools, variables."""

from collections.abc import Mapping
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.data.messages import system_of, tools_of, with_system
from lorakit.data.schemas import Chat
from lorakit.data.values import holds, optional_text, parse_json, without_nulls

# Variables of apply_chat_template that a row cannot set, because it says them elsewhere or not at
# all. `self` and `source` are names of Python's.
_NO_VARIABLES = (
    *("messages", "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "self", "source"),
)


def chat_of(
    before: list[dict[str, Any]], after: list[dict[str, Any]], value: Mapping[str, Any], place: str
) -> Chat:
    """Return a chat of messages that are not learned and of others, with what a row says beside it.

    The system prompt becomes its first message.
    """
    system = system_of(value, place)
    if before:
        before = with_system(before, system, place)
    else:
        after = with_system(after, system, place)
    variables = variables_of(value, place) or None
    return Chat(before + after, tools_of(value, place), len(before), place, variables)


def variables_of(value: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the variables that a row has for its chat template, an object or JSON text of one."""
    name = "chat_template_kwargs"
    variables = value.get(name)
    if isinstance(variables, str) and variables:
        variables = without_nulls(parse_json(variables, f"{place}, {name}"))
    if not variables:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
        raise LorakitError(f"{place}: {name} must be an object, not {variables!r:.60}")
    for key in _NO_VARIABLES:
        if key in variables:
            raise LorakitError(f"{place}: {name} cannot set {key!r}; take it out")
    return dict(variables)


def has_context(value: Mapping[str, Any], place: str) -> str:
    """Name the field of a row that only a chat has a place for, "" if there is none.

    Raises LorakitError if one of them is malformed.
    """
    said = {
        "system": optional_text(value, "system", place),
        "system_prompt": optional_text(value, "system_prompt", place),
        "chat_template_kwargs": variables_of(value, place),
        "tools" if holds(value, "tools") else "functions": tools_of(value, place),
    }
    return next((name for name, item in said.items() if item), "")
