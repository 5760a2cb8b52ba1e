"""The kinds of row: a prompt with its completion or alone, a chat, text, a choice, and others.

Rows of all formats (formats.py) become one of these, and everything after them knows these alone.
"""

from typing import Any, NamedTuple

from lorakit.config.labels import Label
from lorakit.data.messages import is_learned
from lorakit.models.chat_template import REASONING


class Pair(NamedTuple):
    """A prompt and the completion that should follow it.

    `place` tells where the row came from, as "train.jsonl line 3". Every kind of row has one.
    """

    prompt: str
    completion: str
    place: str


class Chat(NamedTuple):
    """Messages as chat templates take them.

    Those before number `first` are never learned, nor are those whose weight is 0. The template
    gets `variables` too.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    first: int
    place: str
    variables: dict[str, Any] | None = None


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
    """Two answers to the same prompt, the better one first.

    `margin` says how much better it is, which a reward model may learn.
    """

    chosen: Pair | Chat
    rejected: Pair | Chat
    place: str
    margin: float | None = None


class Judged(NamedTuple):
    """An answer that is good (desirable) or bad, without another beside it."""

    answer: Pair | Chat | Instruction
    desirable: bool
    place: str


class Prompt(NamedTuple):
    """A prompt without an answer, text or messages. The model answers it, and rewards say how well.

    `columns` are the other fields of the row, for the rewards.
    """

    prompt: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any] | None
    columns: dict[str, Any]
    place: str


class Labelled(NamedTuple):
    """A text that is to be told apart, with the class or the number that it has."""

    text: Text | Pair | Chat
    label: Label
    place: str


OneAnswer = Pair | Chat | Instruction | Text
Row = OneAnswer | Choice | Judged | Prompt | Labelled


def answers_of(row: OneAnswer | Choice | Judged) -> list[OneAnswer]:
    """Return what a model learns of a row: its answer, or the better and the worse one."""
    if isinstance(row, Choice):
        return [row.chosen, row.rejected]
    return [row.answer if isinstance(row, Judged) else row]


def content_of(row: Row) -> list[Any]:
    """Return all that a row says, without where it came from, or variables if it has none.

    The margin of a pair is left out: the same two answers are one row.
    """
    left_out = ("place", "margin")
    said = [item for name, item in zip(row._fields, row, strict=True) if name not in left_out]
    if isinstance(row, Chat) and row.variables is None:
        said.pop()
    return [content_of(item) if isinstance(item, Row) else item for item in said]


def fields_of(row: Row) -> dict[str, Any]:
    """Return fields from which `make_row` (formats.py) makes the row again."""
    if isinstance(row, Choice):
        better, worse = fields_of(row.chosen), fields_of(row.rejected)
        if isinstance(row.chosen, Chat) and not row.chosen.first:
            better = {**better, "prompt": [], "completion": better.pop("messages")}
            worse = {"completion": worse["messages"]}
        chosen = better.pop("completion")
        margin = {} if row.margin is None else {"margin": row.margin}
        return {**better, "chosen": chosen, "rejected": worse["completion"], **margin}
    if isinstance(row, Judged):
        return {**fields_of(row.answer), "label": row.desirable}
    if isinstance(row, Labelled):
        return {**fields_of(row.text), "label": row.label}
    if isinstance(row, Prompt):
        fields = {**row.columns, "prompt": row.prompt}
        return fields | _beside(row)
    if not isinstance(row, Chat):
        named = zip(row._fields, row, strict=True)
        return {name: text for name, text in named if name != "place"}
    before, after = row.messages[: row.first], row.messages[row.first :]
    fields = {"messages": after} if not before else {"prompt": before, "completion": after}
    return fields | _beside(row)


def _beside(row: Chat | Prompt) -> dict[str, Any]:
    """Return the fields that stand beside messages."""
    found = {"tools": row.tools, "chat_template_kwargs": row.variables}
    return {name: value for name, value in found.items() if value is not None}


def has_empty_answer(row: Row) -> bool:
    """Whether an answer that would be learned has no text, no reasoning and no tool calls."""
    if isinstance(row, Prompt) or (isinstance(row, Labelled) and isinstance(row.text, Chat)):
        return False
    if isinstance(row, Labelled):
        return has_empty_answer(row.text)
    if isinstance(row, Choice):
        return has_empty_answer(row.chosen) or has_empty_answer(row.rejected)
    if isinstance(row, Judged):
        return has_empty_answer(row.answer)
    if isinstance(row, Chat):
        return any(
            message["role"] == "assistant"
            and is_learned(message)
            and not any(map(message.get, ("tool_calls", *REASONING)))
            and not (message.get("content") or "").strip()
            for message in row.messages[row.first :]
        )
    return not row[-2].strip()  # the field before `place` is the answer
