"""The messages of a chat, whichever tool wrote them, in the one form that chat templates take.

    {"from": "gpt", "value": "Yo"}              {"role": "assistant", "content": "Yo"}
    {"role": "model", "content": "Yo"}          {"role": "assistant", "content": "Yo"}
    content [{"type": "text", "text": "Yo"}]    content "Yo"
    {..., "function_call": {...}}               {..., "tool_calls": [{...}]}
    {"from": "function_call", "value": "{}"}    {"role": "assistant", "tool_calls": [{...}], ...}
    {..., "train": false}                       {..., "weight": 0}

The parts of a content are joined as they are, without a character between them: parts of text are
text. Templates of models that see pictures take parts too, and write the same for one part.

Templates want `tool_calls` whose `arguments` are an object. OpenAI's files hold the arguments as
JSON text; older ones have `function_call`, the role `function` and the field `functions`; ShareGPT
and ms-swift have turns of calls, which join the answer of the assistant that they follow.

Every tool has its own name for whether a turn is learned. Here it is OpenAI's, a `weight` of 0 in a
message of the assistant. It is left out where it would be 1, so that a turn that is learned is the
same with it and without it.
"""

from collections.abc import Mapping
from typing import Any

from lorakit.config.errors import LorakitError, nearest
from lorakit.data.foreign import check_message
from lorakit.data.values import EmptyAnswer, listed, optional_text, parse_json, text_of
from lorakit.models.chat_template import REASONING

CALL = "call"
# What the roles of other tools mean: ShareGPT's, LLaMA-Factory's, ms-swift's, Gemma's, OpenAI's old
# ones. Capitals and "-" for "_" do not matter. A turn of CALL holds the JSON of calls.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "observations": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
    "function_call": CALL,
    "tool_call": CALL,
    "developer": "developer",
}
# Fields of a message by which tools say whether it is learned: OpenAI's weight, Axolotl's train and
# training, ms-swift's loss and loss_scale.
FLAGS = ("weight", "train", "training", "loss", "loss_scale")
# What a turn of ShareGPT may hold beside from and value. Other fields of it are ignored.
_OF_TURN = ("tool_calls", "function_call", "name", "tool_call_id", *REASONING)


def messages_of(values: Any, place: str, noun: str = "message") -> list[dict[str, Any]]:
    """Return checked messages: each has a role, and text or tool calls.

    Args:
        values: A list of mappings, with role and content or with from and value.
        place: Where the row came from, for errors.
        noun: What errors call each of them.

    Returns:
        New messages. Fields that are not named in this module are kept.

    Raises:
        LorakitError: There is none, one of them is malformed or holds a field that lorakit does not
            obey, or a turn from an unknown role of ShareGPT.
    """
    if not isinstance(values, list) or not values:
        raise LorakitError(f"{place}: messages must be a list of one or more, not {values!r:.60}")
    messages: list[dict[str, Any]] = []
    for i, value in enumerate(values):
        role, message = _message(value, f"{place}, {noun} {i}")
        last = messages[-1] if messages else {}
        same = role == CALL and last.get("role") == "assistant"
        if same and last.get("weight") == message.get("weight"):
            calls = last.get("tool_calls", []) + message["tool_calls"]
            messages[-1] = {**last, "tool_calls": calls}
        else:
            messages.append(message)
    return messages


def is_learned(message: Mapping[str, Any]) -> bool:
    """Return whether a checked message of the assistant may be learned: its weight is not 0."""
    return message.get("weight") != 0


def _message(value: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return the role that ROLES tells, or the message's own, and the message."""
    if not isinstance(value, Mapping):
        raise LorakitError(
            f"{where} must be an object with from and value, or role and content, not {value!r:.60}"
        )
    check_message(value, where)
    message = {str(name): item for name, item in value.items()}
    role = _role(message, where)
    flags = {name: message.pop(name) for name in FLAGS if name in message}
    if "from" in message and "role" not in message:
        message = {name: message[name] for name in message if name in ("value", *_OF_TURN)}
    message["role"] = "assistant" if role == CALL else role
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    if role == CALL:
        message["tool_calls"], message["content"] = _calls_in(message, where), ""
    if "function_call" in message:
        if message.get("tool_calls"):
            raise LorakitError(f"{where} has both function_call and tool_calls: keep one of them")
        message["tool_calls"] = [message.pop("function_call")]
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    for name in REASONING:
        optional_text(message, name, where)
    kind = EmptyAnswer if message["role"] == "assistant" else LorakitError
    if "content" in message:
        message["content"] = _content(message, where)
    elif "from" in value and message.get("tool_calls"):
        message["content"] = ""
    elif "from" in value and "role" not in value:
        raise kind(f"{where}: field 'value' is missing{nearest('value', map(str, value))}")
    elif not message.get("tool_calls"):
        raise kind(f"{where} has neither content nor tool_calls")
    if not _learned(flags, message["role"], where):
        message["weight"] = 0
    return role, message


def _role(message: Mapping[str, Any], where: str) -> str:
    sharegpt = "from" in message and "role" not in message
    name = text_of(message, "from" if sharegpt else "role", where)
    if not name:
        raise LorakitError(f"{where} has an empty role")
    role = ROLES.get(name.casefold().replace("-", "_"))
    if role is None and sharegpt:
        raise LorakitError(
            f"{where} is from {name!r:.60}{nearest(name, ROLES)}; it must be one of "
            f"{', '.join(ROLES)}"
        )
    return role or name  # a template may know roles that no other does


def _content(message: Mapping[str, Any], where: str) -> str:
    """Return the text of a message's content: text, or a list of parts of text."""
    parts = message["content"]
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        return text_of(message, "content", where)
    texts = []
    for i, part in enumerate(parts):
        if part.get("type", "text") != "text":
            raise LorakitError(
                f"{where}, part {i} of the content is of type {part['type']!r:.30}; lorakit reads "
                "parts of type text alone"
            )
        texts.append(text_of(part, "text", f"{where}, part {i} of the content"))
        for name in FLAGS:
            if part.get(name) is not None and not _on(part[name], name, where):
                raise LorakitError(
                    f"{where}, part {i} of the content has {name} {part[name]!r:.30}, and lorakit "
                    "learns a turn or does not: say it of the whole message"
                )
    return "".join(texts)


def _on(flag: Any, name: str, where: str) -> bool:
    """Return whether a flag says that something is learned."""
    if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
        raise LorakitError(
            f"{where} has {name} {flag!r:.30}; a turn is learned or not: write 1 or 0, or true or "
            "false"
        )
    return bool(flag)


def _learned(flags: Mapping[str, Any], role: str, where: str) -> bool:
    """Return whether a message may be learned, as its flags say it.

    Raises LorakitError for flags that are neither on nor off, that contradict each other, or by
    which Axolotl would learn what no assistant said.
    """
    on = {name: _on(flag, name, where) for name, flag in flags.items()}
    if role != "assistant":
        for name in ("train", "training"):
            if on.get(name):
                raise LorakitError(
                    f"{where} is of role {role!r:.30} and has {name} {flags[name]!r}; lorakit "
                    f"learns what the assistant says: take {name} out, or use train_on all"
                )
        return True
    if len(set(on.values())) > 1:
        said = " and ".join(f"{name} {flags[name]!r}" for name in on)
        raise LorakitError(f"{where} has {said}, which contradict each other: keep one of them")
    return all(on.values())


# ---- tools ---------------------------------------------------------------------------------------


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


def _calls_in(message: Mapping[str, Any], where: str) -> list[Any]:
    """Return the calls of a turn of calls: one or a list of them, as JSON text or as an object."""
    calls = message.get("content")
    if not isinstance(calls, (Mapping, list)):
        calls = parse_json(text_of(message, "content", where), f"{where}, value")
    return calls if isinstance(calls, list) else [calls]


def tools_of(value: Mapping[str, Any], place: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row, None if it has none.

    They are a list in `tools`, or JSON text of one, for tables that cannot hold a list. The older
    field `functions` holds the functions alone, and so may `tools` (LLaMA-Factory). Raises
    LorakitError for anything else, and for a row with both.
    """
    tools, functions = (listed(value, name, place) for name in ("tools", "functions"))
    if tools and functions:
        raise LorakitError(f"{place} has both functions and tools: keep one of them")
    for name, each in (("tools", tools), ("functions", functions)):
        if not all(isinstance(tool, Mapping) for tool in each):
            raise LorakitError(f"{place}: {name} must be a list of objects, not {each!r:.60}")
    return [_tool(each) for each in tools or functions] or None


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as templates take it: a function with its name gets the type around it."""
    alone = "name" in tool and not {"type", "function"} & tool.keys()
    return {"type": "function", "function": tool} if alone else dict(tool)


def system_of(value: Mapping[str, Any], place: str) -> str:
    """Return the system prompt that stands beside the messages of a row, "" if there is none.

    Raises LorakitError if it is no text.
    """
    return optional_text(value, "system", place) or optional_text(value, "system_prompt", place)


def with_system(messages: list[dict[str, Any]], system: str, place: str) -> list[dict[str, Any]]:
    """Return messages that begin with a system prompt; as they are if it is "", or there already.

    Raises LorakitError if they begin with another one.
    """
    first = messages[0] if messages else {"role": ""}
    if first["role"] in ("system", "developer"):
        if system and first.get("content") != system:
            raise LorakitError(
                f"{place} has a system prompt in a field of its own and another in its messages: "
                "keep one of them"
            )
        return messages
    return [{"role": "system", "content": system}, *messages] if system else messages
