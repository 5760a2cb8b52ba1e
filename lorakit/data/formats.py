"""What a row of training data means: a prompt and completion, a chat, an instruction, text, more.

    format              fields, those in brackets optional                      becomes
    preference          chosen, rejected: text or messages (prompt, or what     Choice
                        a chat or an instruction has; margin)
                        preferred_output, non_preferred_output, input           Choice
                        messages or conversations, rejected_messages or         Choice
                        rejected_response
    messages            messages: [{role, content, ...}]                        Chat
    sharegpt            conversations, or conversation: [{from, value, ...}]    Chat
    prompt_completion   prompt, completion: both text                           Pair
                        or both messages                                        Chat
    alpaca              instruction, output (input)                             Instruction
                        with history too, or a field of a chat                  Chat
    text                text                                                    Text
    unpaired_preference the fields of messages, sharegpt, prompt_completion or  Judged
                        alpaca, and label or kto_tag: true or false
    prompt_only         prompt: text or messages; others are for rewards        Prompt
    classification      text, prompt, messages or conversations, or prompt and  Labelled
                        completion, and label: text or a number

A row has the format of the first line above whose fields it has, but where a label is true or false
that of the label. Only who asks for classification gets it: a text with a label may be there to
learn the text. A row that is a list is a row of messages. Every row that becomes a chat may have
tools, a system prompt, and chat_template_kwargs, the variables that its template gets. Fields that
are null are left out, because a table has them in every row.

The messages of all formats are read in one way, whichever tool wrote them (messages.py). Every
field of a message reaches the chat template: tool calls, reasoning, names. Fields of a row that
nobody trains on are ignored. Those that other tools obey are read, or refuse the row (foreign.py).

A new format needs its fields in FORMATS, and in _MAKE a function that makes one of the kinds of Row
from a mapping.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import product
from typing import Any

from lorakit.config.errors import LorakitError, nearest
from lorakit.data.beside import chat_of, has_context, variables_of
from lorakit.data.foreign import LABELED, LABELS, check_row, has_verdict, verdict_of
from lorakit.data.instructions import assistant, history_of, request, user
from lorakit.data.messages import messages_of, system_of, tools_of, with_system
from lorakit.data.schemas import (
    Chat,
    Choice,
    Instruction,
    Judged,
    Labelled,
    Pair,
    Prompt,
    Row,
    Text,
)
from lorakit.data.values import (
    EmptyAnswer,
    field,
    filled_text,
    has,
    holds,
    optional_text,
    text_of,
    without_nulls,
)

# ms-swift's fields of a worse answer. The better one stands in the messages.
_REJECTED = ("rejected_messages", "rejected_response")
_CHATS = ("conversations", "conversation", "messages")
# The fields that a row of each format must have, in each of its forms. A row that has the fields of
# several formats has the first of them.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "preference": (
        ("chosen", "rejected"),
        ("preferred_output", "non_preferred_output"),
        *product(_CHATS, _REJECTED),
    ),
    "messages": (("messages",),),
    "sharegpt": (("conversations",), ("conversation",)),
    "prompt_completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"),),
    "text": (("text",),),
    "unpaired_preference": tuple(("prompt", "completion", name) for name in LABELS),
    "prompt_only": (("prompt",),),
    "classification": (("text", "label"), ("prompt", "label"), ("messages", "label")),
}
# Those that the fields of a row tell.
_TOLD = {name: forms for name, forms in FORMATS.items() if name != "classification"}
# Those whose rows have a class if there is a label.
_CLASSED = ("text", "prompt_only", "messages", "sharegpt", "prompt_completion")


def detect(value: Any, place: str) -> str:
    """Return the format of a row, which its fields tell; "rows" for one that is made already.

    Raises LorakitError for a value that is no mapping, or has no field of any format.
    """
    if isinstance(value, Row):
        return "rows"
    if _is_chat(value):
        return "messages"
    names = _names_of(value, place)
    two = {"chosen", "rejected"}
    if two <= value.keys() and not two.isdisjoint(names):
        return "preference"  # also where one of the two is null, which a prompt alone has not
    if has_verdict(value):
        without = {name: item for name, item in value.items() if name not in LABELS}
        if without and detect(without, place) in LABELED:
            return "unpaired_preference"
    for format, forms in _TOLD.items():
        if any(all(name in names for name in fields) for fields in forms):
            return format
    for format, forms in _TOLD.items():
        if any(any(name in names for name in fields) for fields in forms):
            return format  # making the row will name the field that is missing
    close = [nearest(name, names) for forms in _TOLD.values() for name in forms[0]]
    raise LorakitError(
        f"{place} has no field that tells its format{next(filter(None, close), '')}: messages, "
        "conversations, prompt and completion, chosen and rejected, instruction and output, text, "
        "or a prompt alone; it has "
        f"{', '.join(names) or 'none':.200}"
    )


def _is_chat(value: Any) -> bool:
    """Return whether a row is a list of messages, without a name."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _names_of(value: Any, place: str) -> list[str]:
    if not isinstance(value, Mapping):
        raise LorakitError(f"{place} must be an object with named fields, not {value!r:.60}")
    return [str(name) for name, item in value.items() if item is not None]


def make_row(value: Any, place: str, format: str | None) -> Row:
    """Return the row that a mapping of `format` means. A row that is made already is returned.

    Raises LorakitError for a field that is missing or holds something else than the format says,
    and for one that other tools obey and lorakit does not.
    """
    if isinstance(value, Row):
        return value
    if format not in _MAKE:
        raise LorakitError(f"{place}: rows that were read and others are mixed")
    if _is_chat(value):
        value = {"messages": value}
    _names_of(value, place)
    value = {name: without_nulls(item) for name, item in value.items()}
    check_row(value, format, place)
    row = _MAKE[format](value, place)
    _check_context(value, row, place, format)
    _check_pair(value, row, place, format)
    return row


def _check_context(value: Mapping[str, Any], row: Row, place: str, format: str) -> None:
    """Raise LorakitError if a row holds a field of chats for which its format has no place.

    A row that has another format's fields too may hold it for that one.
    """
    name, answer = "", row
    if isinstance(row, (Choice, Judged, Labelled)):
        answer = row[0]
    chat = isinstance(answer, Prompt) and not isinstance(answer.prompt, str)
    if not isinstance(answer, Chat) and not chat:
        name = has_context(value, place)
    history = value.get("history")
    if isinstance(history, str):  # text is no history, unless it is JSON
        history = history.lstrip().startswith("[[")
    if not name and not has(value, "instruction") and history:
        name = "history"
    if name and detect(value, place) == format:
        raise LorakitError(
            f"{place} has a field {name!r}, for which a row of format {format} has no place here; "
            "write the row as messages, or take the field out"
        )


def _check_pair(value: Mapping[str, Any], row: Row, place: str, format: str) -> None:
    """Raise LorakitError if a row that is no pair holds one of two answers, and lacks the other.

    A row that has the fields of a pair too may hold it for that.
    """
    for name in ("chosen", "preferred_output", "rejected", "non_preferred_output", *_REJECTED):
        answer = holds(value, name) and isinstance(value[name], (str, list, Mapping))
        if answer and not isinstance(row, Choice) and detect(value, place) == format:
            raise LorakitError(
                f"{place} has a field {name!r}, one of two answers, but a row of format {format} "
                "is no pair; write both as chosen and rejected, or take the field out"
            )


# ---- the formats ---------------------------------------------------------------------------------


def _pair(value: Mapping[str, Any], place: str) -> Pair | Chat:
    prompt, completion = field(value, "prompt", place), field(value, "completion", place)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = messages_of(prompt, f"{place}, prompt") if prompt else []
        after = messages_of(completion, f"{place}, completion")
        return chat_of(before, after, value, place)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise LorakitError(f"{place}: prompt and completion must both be text, or both messages")
    return Pair(text_of(value, "prompt", place), filled_text(value, "completion", place), place)


def _choice(value: Mapping[str, Any], place: str) -> Row:
    """Return two answers to a prompt that stands apart, or that both answers begin with.

    Each answer is text, a message, or messages. An answer of text is a message if the prompt is
    messages.
    """
    value = _as_chosen_and_rejected(value, place)
    answers = []
    for name in ("chosen", "rejected"):
        answer = field(value, name, place)
        if not isinstance(answer, (str, list, Mapping)):
            kind = EmptyAnswer if answer is None else LorakitError
            raise kind(f"{place}: {name} must be text or messages, not {answer!r:.60}")
        answers.append([answer] if isinstance(answer, Mapping) else answer)
    prompt = _prompt(value, answers, place)
    if isinstance(prompt, list):
        answers = [[assistant(a)] if isinstance(a, str) else a for a in answers]
        if all(answer[: len(prompt)] == prompt for answer in answers):
            answers = [answer[len(prompt) :] for answer in answers]
    if any(isinstance(answer, str) != isinstance(prompt, str) for answer in answers):
        raise LorakitError(
            f"{place}: prompt, chosen and rejected must all be text, or all be messages"
        )
    chosen, rejected = (
        _pair({**value, "prompt": prompt, "completion": answer}, f"{place}, {name}")
        for answer, name in zip(answers, ("chosen", "rejected"), strict=True)
    )
    return Choice(chosen, rejected, place, _margin(value, place))


def _margin(value: Mapping[str, Any], place: str) -> float | None:
    """Return how much better the better answer is, if the row says it; text of CSV is a number."""
    margin = value.get("margin")
    if margin is None:
        return None
    number = math.nan
    if isinstance(margin, str | int | float):
        with suppress(ValueError):
            number = float(margin)
    if not math.isfinite(number):
        raise LorakitError(f"{place}: margin must be a number, not {margin!r:.60}")
    return number


def _prompt(value: Mapping[str, Any], answers: list[Any], place: str) -> Any:
    """Return the prompt of two answers, text or messages.

    A prompt of text beside two chats is what both chats begin with, as in TRL (`extract_prompt`),
    or the message of a user if they begin with nothing in common.
    """
    prompt, chats = value.get("prompt"), all(isinstance(answer, list) for answer in answers)
    both = answers[0][: _shared(answers)] if chats else []
    if prompt is None and not both:
        for name in _CHATS:
            if has(value, name):
                return _asked(value[name], f"{place}, {name}")
        if has(value, "instruction"):
            return [*history_of(value, place), user(_request(value, place))]
        if not chats:
            raise LorakitError(f"{place}: chosen and rejected need a prompt, unless both are chats")
    if isinstance(prompt, list) or not chats:
        return prompt
    text = optional_text(value, "prompt", place).strip()
    if prompt is None and not both:
        raise LorakitError(
            f"{place}: chosen and rejected begin with no message in common, and there is no "
            "prompt; give them one"
        )
    if text and not both:
        return [user(value["prompt"])]
    if text and not any(text in m.get("content", "") for m in messages_of(both, place)):
        raise LorakitError(
            f"{place}: chosen and rejected begin with messages that do not hold the prompt; take "
            "one of the two out"
        )
    return both


def _asked(chat: Any, place: str) -> Any:
    """Return the messages before two answers. Raises LorakitError if an answer is among them."""
    if messages_of(chat, place)[-1]["role"] == "assistant":
        raise LorakitError(
            f"{place}: the last message is an answer already, and chosen and rejected would follow "
            "it; take it out"
        )
    return chat


def _shared(answers: list[Any]) -> int:
    """Return how many messages both answers begin with, so that one of each at least is left."""
    pairs = enumerate(zip(*answers, strict=False))
    shortest = min(map(len, answers))
    return next((i for i, (a, b) in pairs if a != b), max(shortest - 1, 0))


def _as_chosen_and_rejected(value: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Return a pair of OpenAI or ms-swift with the fields of TRL."""
    if has(value, "preferred_output") or has(value, "non_preferred_output"):
        asked = field(value, "input", place)
        if not isinstance(asked, Mapping):
            raise LorakitError(f"{place}: input must be an object with messages, not {asked!r:.60}")
        answers = {
            "prompt": field(asked, "messages", f"{place}, input"),
            "chosen": field(value, "preferred_output", place),
            "rejected": field(value, "non_preferred_output", place),
        }
        return {
            **value,
            **{name: asked[name] for name in ("tools",) if has(asked, name)},
            **answers,
        }
    name = next((name for name in _CHATS if has(value, name)), "")
    messages = value.get(name)
    if has(value, "rejected") or not isinstance(messages, list):
        return value
    if has(value, "rejected_messages"):
        return {**value, "chosen": messages, "rejected": value["rejected_messages"]}
    if has(value, "rejected_response"):
        roles = [message["role"] for message in messages_of(messages, place)]
        start = max((i + 1 for i, role in enumerate(roles) if role == "user"), default=0)
        return {
            **value,
            "prompt": messages[:start],
            "chosen": messages[start:],
            "rejected": value["rejected_response"],
        }
    return value


def _chat(value: Mapping[str, Any], place: str) -> Row:
    messages = messages_of(field(value, "messages", place), place)
    return chat_of([], messages, value, place)


def _sharegpt(value: Mapping[str, Any], place: str) -> Row:
    name = "conversation" if has(value, "conversation") else "conversations"
    turns = field(value, name, place)
    if not isinstance(turns, list):
        raise LorakitError(f"{place}: {name} must be a list of turns, not {turns!r:.60}")
    return chat_of([], messages_of(turns, place, "turn"), value, place)


def _alpaca(value: Mapping[str, Any], place: str) -> Row:
    instruction = text_of(value, "instruction", place)
    more = optional_text(value, "input", place)
    output = filled_text(value, "output", place)
    before = history_of(value, place)
    if not before and not has_context(value, place):
        return Instruction(instruction, more, output, place)
    return chat_of([], [*before, user(_request(value, place)), assistant(output)], value, place)


def _request(value: Mapping[str, Any], place: str) -> str:
    return request(text_of(value, "instruction", place), optional_text(value, "input", place))


def _plain(value: Mapping[str, Any], place: str) -> Row:
    return Text(filled_text(value, "text", place), place)


def _judged(value: Mapping[str, Any], place: str) -> Row:
    """Return an answer that a row says is good or bad."""
    without = {name: item for name, item in value.items() if name not in LABELS}
    format = detect(without, place)
    if format not in LABELED:
        raise LorakitError(
            f"{place}: a row with a label needs one answer: prompt and completion, messages, "
            "conversations, or instruction and output"
        )
    answer = _MAKE[format](without, place)
    assert isinstance(answer, (Pair, Chat, Instruction))
    return Judged(answer, verdict_of(value, place), place)


def _prompt_only(value: Mapping[str, Any], place: str) -> Row:
    """Return a prompt of text, or of messages that do not end in an answer."""
    prompt = field(value, "prompt", place)
    beside = ("prompt", "tools", "functions", "system", "system_prompt", "chat_template_kwargs")
    columns = {str(name): item for name, item in value.items() if name not in beside}
    if not isinstance(prompt, list):
        text = text_of(value, "prompt", place)
        if not text:
            raise LorakitError(f"{place}: the prompt is empty")
        return Prompt(text, None, None, columns, place)
    messages = messages_of(prompt, f"{place}, prompt")
    if messages[-1]["role"] == "assistant":
        raise LorakitError(
            f"{place}: the prompt ends with an answer of the assistant; take that out, or write it "
            "as the completion"
        )
    messages = with_system(messages, system_of(value, place), place)
    variables = variables_of(value, place) or None
    return Prompt(messages, tools_of(value, place), variables, columns, place)


def _classified(value: Mapping[str, Any], place: str) -> Row:
    """Return a text with its class, or with its number."""
    label = field(value, "label", place)
    if isinstance(label, list):
        raise LorakitError(f"{place}: label must be one class, not the list {label!r:.60}")
    known = isinstance(label, (str, int)) or (isinstance(label, float) and math.isfinite(label))
    if not known or (isinstance(label, str) and not label.strip()):
        raise LorakitError(f"{place}: label must be text or a number, not {label!r:.60}")
    without = {name: item for name, item in value.items() if name != "label"}
    format = detect(without, place)
    if format not in _CLASSED:
        raise LorakitError(
            f"{place}: a row with a class has a text, prompt, messages or conversations beside its "
            f"label, and is of no format {format}"
        )
    if format != "prompt_only":
        text = make_row(without, place, format)
    elif isinstance(without["prompt"], list):
        text = chat_of([], messages_of(without["prompt"], f"{place}, prompt"), without, place)
    else:
        text = Text(filled_text(without, "prompt", place), place)
    assert isinstance(text, (Text, Pair, Chat))
    return Labelled(text, label, place)


_MAKE: dict[str, Callable[[Mapping[str, Any], str], Row]] = {
    "preference": _choice,
    "messages": _chat,
    "sharegpt": _sharegpt,
    "prompt_completion": _pair,
    "alpaca": _alpaca,
    "text": _plain,
    "unpaired_preference": _judged,
    "prompt_only": _prompt_only,
    "classification": _classified,
}
