"""What an instruction becomes: a chat, or a prompt if the tokenizer has no chat template."""

from collections.abc import Mapping
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.data.schemas import Chat, Instruction, Pair
from lorakit.data.values import listed

# The prompts of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py).
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def as_chat_or_pair(row: Instruction, chat: bool) -> Chat | Pair:
    """Return an instruction as a chat of two messages, or as Alpaca's prompt and its completion."""
    if chat:
        messages = [user(request(row.instruction, row.input)), assistant(row.output)]
        return Chat(messages, None, 0, row.place)
    prompt = _ALPACA_WITH_INPUT if row.input else _ALPACA
    prompt = prompt.format(instruction=row.instruction, input=row.input)
    return Pair(prompt, row.output, row.place)


def request(instruction: str, input: str) -> str:
    """Return what a user says who gives an instruction, and something to carry it out on."""
    return f"{instruction}\n\n{input}" if input else instruction


def user(text: str) -> dict[str, Any]:
    """Return the message of a user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    """Return the message of the assistant."""
    return {"role": "assistant", "content": text}


def history_of(value: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """Return the exchanges before an instruction as messages: pairs of a prompt and an answer.

    Raises LorakitError if the field `history` of the row holds anything else.
    """
    messages = []
    for i, turn in enumerate(listed(value, "history", place)):
        pair = isinstance(turn, (list, tuple)) and len(turn) == 2
        if not pair or not all(isinstance(text, str) for text in turn):
            raise LorakitError(
                f"{place}: history must hold pairs of a prompt and an answer, but number {i} is "
                f"{turn!r:.60}"
            )
        messages += [user(turn[0]), assistant(turn[1])]
    return messages
