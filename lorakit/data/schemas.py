"""What a row of training data means: a prompt with its completion, a chat, an instruction, or text.

    format              fields, those in brackets optional                      becomes
    messages            messages: [{role, content, ...}] (tools)                Chat
    sharegpt            conversations: [{from, value, ...}] (system, tools)     Chat
    prompt_completion   prompt, completion: both text                           Pair
                        or both messages (tools)                                Chat
    preference          chosen, rejected (prompt, tools): text or messages      Choice
    alpaca              instruction, output (input)                             Instruction
    text                text                                                    Text

A row has the format of the first line above whose fields it has. Fields that the format does not
name are ignored. Every field of a message reaches the chat template: tool calls, reasoning, names.
Fields that are null are left out, because a table has them in every row.

Tool calls come in several forms, and templates want one: `tool_calls` whose `arguments` are an
object. OpenAI's files hold the arguments as JSON text; older ones have `function_call`, the role
`function` and the field `functions`; ShareGPT has turns from `function_call`. All become that form.

A new format needs its fields in FORMATS, and in _MAKE a function that makes one of the kinds of Row
from a mapping.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lorakit.config.errors import LorakitError, nearest
from lorakit.models.chat_template import REASONING

# The fields that a row of each format must have. A row that has the fields of several formats has
# the first of them.
FORMATS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",  # the value of its turn is JSON text of a call, or of several
}


class EmptyAnswer(LorakitError):
    """A row has no answer to learn, and `skip_empty` would leave it out."""


class Pair(NamedTuple):
    """A prompt and the completion that should follow it.

    `place` tells where the row came from, as "train.jsonl line 3". Every kind of row has one.
    """

    prompt: str
    completion: str
    place: str


class Chat(NamedTuple):
    """Messages as chat templates take them. Those before number `first` are never learned."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    first: int
    place: str


class Instruction(NamedTuple):
    """A row of Alpaca. It becomes a chat, or a prompt if the tokenizer has no chat template."""

    instruction: str
    input: str
    output: str
    place: str


class Text(NamedTuple):
    """Text to learn from its first token to its last."""

    text: str
    place: str


class Choice(NamedTuple):
    """Two answers to the same prompt, the better one first."""

    chosen: Pair | Chat
    rejected: Pair | Chat
    place: str


OneAnswer = Pair | Chat | Instruction | Text
Row = OneAnswer | Choice


def content_of(row: Row) -> list[Any]:
    """Return all that a row says, without where it came from."""
    return [content_of(item) if isinstance(item, Row) else item for item in row[:-1]]


def has_empty_answer(row: Row) -> bool:
    """Whether an answer that would be learned has no text, no reasoning and no tool calls."""
    if isinstance(row, Choice):
        return has_empty_answer(row.chosen) or has_empty_answer(row.rejected)
    if isinstance(row, Chat):
        return any(
            message["role"] == "assistant"
            and not any(map(message.get, ("tool_calls", *REASONING)))
            and not (message.get("content") or "").strip()
            for message in row.messages[row.first :]
        )
    return not row[-2].strip()  # the field before `place` is the answer


def parse_json(text: str, place: str) -> Any:
    """Return the value of JSON text. Raises LorakitError, with its place, if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not only bad JSON: numbers of 5000 digits too
        raise LorakitError(f"{place} is not valid JSON: {error}") from None


def detect(value: Any, place: str) -> str:
    """Return the format of a row, which its fields tell; "rows" for one that is made already.

    Raises LorakitError for a value that is no mapping, or has no field of any format.
    """
    if isinstance(value, Row):
        return "rows"
    names = _fields_of(value, place)
    for format, fields in FORMATS.items():
        if all(field in names for field in fields):
            return format
    for format, fields in FORMATS.items():
        if any(field in names for field in fields):
            return format  # making the row will name the field that is missing
    close = [nearest(field, names) for fields in FORMATS.values() for field in fields]
    raise LorakitError(
        f"{place} has no field that tells its format{next(filter(None, close), '')}: messages, "
        "conversations, prompt and completion, chosen and rejected, instruction and output, or "
        "text; it has "
        f"{', '.join(names) or 'none':.200}"
    )


def _fields_of(value: Any, place: str) -> list[str]:
    if not isinstance(value, Mapping):
        raise LorakitError(f"{place} must be an object with named fields, not {value!r:.60}")
    return [str(name) for name in value]


def make_row(value: Any, place: str, format: str | None) -> Row:
    """Return the row that a mapping of `format` means. A row that is made already is returned.

    Raises LorakitError for a field that is missing or holds something else than the format says.
    """
    if isinstance(value, Row):
        return value
    if format not in _MAKE:
        raise LorakitError(f"{place}: rows that were read and others are mixed")
    _fields_of(value, place)
    return _MAKE[format]({name: _without_nulls(item) for name, item in value.items()}, place)


def _without_nulls(value: Any) -> Any:
    """Return a value without the fields that are null.

    In a table all objects of a column have the fields of all the others, null where they have none.
    """
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _get(value: Mapping[str, Any], name: str, place: str) -> Any:
    if name not in value:
        raise LorakitError(f"{place}: field {name!r} is missing{nearest(name, map(str, value))}")
    return value[name]


def _text(value: Mapping[str, Any], name: str, place: str) -> str:
    text = _get(value, name, place)
    if not isinstance(text, str):
        raise LorakitError(f"{place}: field {name!r} must be text, not {text!r:.60}")
    return text


def _filled(value: Mapping[str, Any], name: str, place: str) -> str:
    if _get(value, name, place) in ("", None):
        raise EmptyAnswer(
            f"{place}: the {name} is empty, there is nothing to learn; set skip_empty to leave "
            "such rows out"
        )
    return _text(value, name, place)


def _optional_text(value: Mapping[str, Any], name: str, place: str) -> str:
    return "" if value.get(name) is None else _text(value, name, place)


def _pair(value: Mapping[str, Any], place: str) -> Pair | Chat:
    prompt, completion = _get(value, "prompt", place), _get(value, "completion", place)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, f"{place}, prompt") if prompt else []
        after = _messages(completion, f"{place}, completion")
        return Chat(before + after, _tools(value, place), len(before), place)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise LorakitError(f"{place}: prompt and completion must both be text, or both messages")
    return Pair(_text(value, "prompt", place), _filled(value, "completion", place), place)


def _choice(value: Mapping[str, Any], place: str) -> Row:
    """Return two answers to a prompt that stands apart, or that both answers begin with."""
    answers = [_get(value, name, place) for name in ("chosen", "rejected")]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not isinstance(answer, (str, list)):
            raise LorakitError(f"{place}: {name} must be text or messages, not {answer!r:.60}")
    prompt, shared = value.get("prompt"), 0
    if prompt is None:
        if not all(isinstance(answer, list) for answer in answers):
            raise LorakitError(f"{place}: chosen and rejected need a prompt, unless both are chats")
        for a, b in zip(*answers, strict=False):
            if a != b:
                break
            shared += 1
        prompt = answers[0][:shared]
    chosen, rejected = (
        _pair({**value, "prompt": prompt, "completion": answer[shared:]}, f"{place}, {name}")
        for answer, name in zip(answers, ("chosen", "rejected"), strict=True)
    )
    return Choice(chosen, rejected, place)


def _chat(value: Mapping[str, Any], place: str) -> Row:
    return Chat(_messages(_get(value, "messages", place), place), _tools(value, place), 0, place)


def _sharegpt(value: Mapping[str, Any], place: str) -> Row:
    turns = _get(value, "conversations", place)
    if not isinstance(turns, list):
        raise LorakitError(f"{place}: conversations must be a list of turns, not {turns!r:.60}")
    system = _optional_text(value, "system", place)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns):
        where = f"{place}, turn {i}"
        if not isinstance(turn, Mapping):
            raise LorakitError(f"{where} must be an object with from and value, not {turn!r:.60}")
        role = _text(turn, "from", where)
        if role not in SHAREGPT_ROLES:
            raise LorakitError(
                f"{where} is from {role!r:.60}{nearest(role, SHAREGPT_ROLES)}; it must be one of "
                f"{', '.join(SHAREGPT_ROLES)}"
            )
        if role == "function_call":
            called = {"tool_calls": _calls_in(_text(turn, "value", where), where)}
            messages.append({"role": "assistant", "content": ""} | called)
            continue
        called = {name: turn[name] for name in ("tool_calls", "function_call") if name in turn}
        text = (_optional_text if called else _text)(turn, "value", where)
        messages.append({"role": SHAREGPT_ROLES[role], "content": text} | called)
    return Chat(_messages(messages, place), _tools(value, place), 0, place)


def _alpaca(value: Mapping[str, Any], place: str) -> Row:
    instruction = _text(value, "instruction", place)
    more = _optional_text(value, "input", place)
    return Instruction(instruction, more, _filled(value, "output", place), place)


def _plain(value: Mapping[str, Any], place: str) -> Row:
    return Text(_filled(value, "text", place), place)


_MAKE: dict[str, Callable[[Mapping[str, Any], str], Row]] = {
    "messages": _chat,
    "sharegpt": _sharegpt,
    "prompt_completion": _pair,
    "preference": _choice,
    "alpaca": _alpaca,
    "text": _plain,
}


def _messages(values: Any, place: str) -> list[dict[str, Any]]:
    """Return checked messages: each has a role, and text or tool calls. Other fields are kept."""
    if not isinstance(values, list) or not values:
        raise LorakitError(f"{place}: messages must be a list of one or more, not {values!r:.60}")
    return [_message(value, f"{place}, message {i}") for i, value in enumerate(values)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise LorakitError(f"{where} must be an object with role and content")
    message = {str(name): item for name, item in value.items() if item is not None}
    if not _text(message, "role", where):
        raise LorakitError(f"{where} has an empty role")
    if "function_call" in message:
        if message.get("tool_calls"):
            raise LorakitError(f"{where} has both function_call and tool_calls: keep one of them")
        message["tool_calls"] = [message.pop("function_call")]
    if message["role"] == "function":  # how OpenAI called a tool's answer before
        message["role"] = "tool"
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    if "content" in message:
        _text(message, "content", where)
    elif not message.get("tool_calls"):
        kind = EmptyAnswer if message["role"] == "assistant" else LorakitError
        raise kind(f"{where} has neither content nor tool_calls")
    return message


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls as templates take them: {type, function: {name, arguments: {...}}, ...}."""
    if not isinstance(calls, list):
        raise LorakitError(f"{where}: tool_calls must be a list, not {calls!r:.60}")
    return [_tool_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise LorakitError(f"{where} must be an object with name and arguments, not {call!r:.60}")
    whole: dict[str, Any] = {"type": "function", "function": call}
    if "function" in call:
        whole = dict(call)
    function = whole["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise LorakitError(f"{where} must have a function with a name, not {function!r:.60}")
    if "arguments" not in function:
        return whole
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}, arguments") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise LorakitError(f"{where}: arguments must be an object, not {arguments!r:.60}")
    whole["function"] = {**function, "arguments": arguments}
    return whole


def _calls_in(text: str, where: str) -> list[Any]:
    """Return the calls in the JSON text of a ShareGPT turn: one call, or a list of calls."""
    calls = parse_json(text, f"{where}, value")
    return calls if isinstance(calls, list) else [calls]


def _tools(value: Mapping[str, Any], place: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row: a list, or JSON text of one, for tables that cannot hold a list.

    The older field `functions` holds the functions alone.
    """
    name = "functions" if value.get("functions") else "tools"
    if name == "functions" and value.get("tools"):
        raise LorakitError(f"{place} has both functions and tools: keep one of them")
    tools = value.get(name)
    if isinstance(tools, str) and tools:
        tools = parse_json(tools, f"{place}, {name}")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise LorakitError(f"{place}: {name} must be a list of objects, not {tools!r:.60}")
    if name == "functions":
        return [{"type": "function", "function": each} for each in tools]
    return tools
