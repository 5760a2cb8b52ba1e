"""Which part of a rendered chat an assistant's turn wrote.

    <user>Hi<end> <assistant>Hello!<end> <user>...
                             ^           render(messages[:1], generation prompt) reaches to here,
                                    ^    render(messages[:2]) to here

A chat template is a program, and says nowhere what it does. So the turn is found by comparing what
it renders: up to the turn with the header that generation starts from, and up to its end. Both are
beginnings of the whole text for nearly all templates, and what lies between is what the model would
have had to write. White space after its end token is nobody's.

Some templates show a turn otherwise once others follow it (Qwen3 leaves out its reasoning). Then
the turn's content is exchanged for two others, within the whole chat: what stays the same before
and after it is the template's. A turn of which something is missing is refused: it would be learned
as if the model had never thought.
"""

from collections.abc import Callable
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.models.chat_template import REASONING, Messages

Render = Callable[..., str]
"""render(messages, generation_prompt=False)"""

PROBES = ("0123456789", "9876543210")


def turn_span(render: Render, messages: Messages, text: str, i: int) -> tuple[int, int]:
    """Where in `text`, the rendering of `messages`, the assistant's message `i` starts and ends.

    Raises LorakitError if the template shows the turn in a way that leaves it unclear.
    """
    before = _tried(render, messages[:i], True)
    after = _tried(render, messages[: i + 1])
    known = before is not None and text.startswith(before)
    if known and after is not None and text.startswith(after) and len(after) > len(before):
        check_shown(messages[i], i, text[len(before) : len(after)])
        return len(before), len(after)

    shown = [render([*messages[:i], probe, *messages[i + 1 :]]) for probe in _probes(messages[i])]
    header, tail = _common(*shown), _common_suffix(*shown)
    alone = [_tried(render, [*messages[:i], probe]) for probe in _probes(messages[i])]
    closing = (tail if None in alone else _common_suffix(*alone)).rstrip()
    start, end = _start(header, before), len(text) - len(tail)
    fits = start <= end and text.startswith(header[:start]) and text.endswith(tail)
    if not (fits and tail.startswith(closing)):
        raise LorakitError(
            f"the chat template shows message {i} in a way that leaves unclear where it starts and "
            "ends; use train_on all"
        )
    check_shown(messages[i], i, text[start:end])
    return start, end + len(closing)


def check_shown(message: dict[str, Any], i: int, shown: str) -> None:
    """Raise LorakitError unless `shown` holds what message `i` says, but for case and spaces."""
    for name in ("content", *REASONING):
        value = message.get(name)
        if isinstance(value, str) and _letters(value) not in _letters(shown):
            raise LorakitError(
                f"the chat template leaves out the {name} of message {i}, or a part of it; if only "
                "since others follow, train on last_turn with a row for each such turn; if in any "
                f"case, take the {name} out of the row"
            )


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


def _start(header: str, before: str | None) -> int:
    """Where the turn starts: behind its header, but for white space that generation writes."""
    space = header[len(header.rstrip()) :]
    start = len(header)
    while before is not None and space and not before.endswith(space):
        space, start = space[:-1], start - 1
    return start


def dropped(render: Render, messages: Messages, text: str) -> str | None:
    """A message that the template leaves out, or the tool calls of one; None if there is none."""
    for i, message in enumerate(messages):

        def same(other: dict[str, Any], i: int = i) -> bool:
            return _tried(render, [*messages[:i], other, *messages[i + 1 :]]) == text

        if all(same(probe) for probe in _probes(message)):
            return f"message {i}, of role {message['role']!r:.60}"
        without = {name: value for name, value in message.items() if name != "tool_calls"}
        if message.get("tool_calls") and same({"content": "", **without}):
            return f"the tool_calls of message {i}"
    return None


def _probes(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": message["role"], "content": probe} for probe in PROBES]


def _tried(render: Render, messages: Messages, generation_prompt: bool = False) -> str | None:
    """None where the template refuses, as many do a chat that does not start with a user."""
    if not messages:
        return None
    try:
        return render(messages, generation_prompt)
    except LorakitError:
        return None


def _common(a: str, b: str) -> str:
    """What both texts start with."""
    pairs = enumerate(zip(a, b, strict=False))
    return a[: next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))]


def _common_suffix(a: str, b: str) -> str:
    return _common(a[::-1], b[::-1])[::-1]
