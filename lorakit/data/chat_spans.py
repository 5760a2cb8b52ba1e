"""Finds the part of a rendered chat that an assistant's turn wrote.

    <user>Hi<end> <assistant>Hello!<end> <user>...
                             ^           render(messages[:1], generation prompt) reaches to here,
                                    ^    render(messages[:2]) to here

A chat template is a program, and nothing says what it does. So two of its renderings are compared:
the messages before the turn with the header that generation starts from, and the messages up to the
end of the turn. Nearly all templates make both beginnings of the whole text, and what lies between
their ends is what the model would have had to write. White space after the end token of a turn
belongs to no turn.

Some templates show a turn otherwise once others follow it (Qwen3 leaves out its reasoning). Then
the turn's content is exchanged for two others, within the whole chat: the text that stays the same
before and after the content comes from the template. A turn that is not shown whole is refused: the
model would learn it as if it had never thought.
"""

from typing import Any, Protocol

from lorakit.config.errors import LorakitError
from lorakit.models.chat_template import REASONING, Messages

PROBES = ("0123456789", "9876543210")  # contents that differ in every character


class Render(Protocol):
    """Renders messages by a chat template, with the header of an answer after them if asked."""

    def __call__(self, messages: Messages, generation_prompt: bool = False) -> str: ...


def turn_span(render: Render, messages: Messages, text: str, i: int) -> tuple[int, int]:
    """Return where the assistant's message `i` starts and ends in `text`, rendered `messages`.

    Raises LorakitError if the template shows the turn in a way that leaves it unclear.
    """
    before = _tried(render, messages[:i], generation_prompt=True)
    after = _tried(render, messages[: i + 1])
    if (
        before is not None
        and after is not None
        and text.startswith(before)
        and text.startswith(after)
        and len(after) > len(before)
    ):
        check_shown(messages[i], i, text[len(before) : len(after)])
        return len(before), len(after)

    one, other = _probes(messages[i])
    shown, shown_other = (
        render([*messages[:i], probe, *messages[i + 1 :]]) for probe in (one, other)
    )
    header, tail = _common_prefix(shown, shown_other), _common_suffix(shown, shown_other)
    # The tail holds the turn's own end token and then the later turns. The end token alone follows
    # the content if the turn is the last one.
    last, last_other = (_tried(render, [*messages[:i], probe]) for probe in (one, other))
    closing = tail
    if last is not None and last_other is not None:
        closing = _common_suffix(last, last_other)
    closing = closing.rstrip()
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
    """Raise LorakitError unless `shown` holds what message `i` says. Case and spaces may differ."""
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
    """Return where the turn starts: after its header, less the white space that the model writes.

    `before` is the text that generation starts from, or None if the template refuses to render it.
    """
    space = header[len(header.rstrip()) :]
    start = len(header)
    while before is not None and space and not before.endswith(space):
        space, start = space[:-1], start - 1
    return start


def dropped(render: Render, messages: Messages, text: str) -> str | None:
    """Name a message that the template leaves out, or its tool calls; None if it shows all.

    A message is left out if the chat renders to `text` with any content in its place.
    """

    def renders_to_text(i: int, other: dict[str, Any]) -> bool:
        return _tried(render, [*messages[:i], other, *messages[i + 1 :]]) == text

    for i, message in enumerate(messages):
        if all(renders_to_text(i, probe) for probe in _probes(message)):
            return f"message {i}, of role {message['role']!r:.60}"
        without = {name: value for name, value in message.items() if name != "tool_calls"}
        if message.get("tool_calls") and renders_to_text(i, {"content": "", **without}):
            return f"the tool_calls of message {i}"
    return None


def _probes(message: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    one, other = ({"role": message["role"], "content": probe} for probe in PROBES)
    return one, other


def _tried(render: Render, messages: Messages, generation_prompt: bool = False) -> str | None:
    """Return the rendering, or None if there are no messages or the template refuses them.

    Many templates refuse a chat that does not start with a user.
    """
    if not messages:
        return None
    try:
        return render(messages, generation_prompt)
    except LorakitError:
        return None


def _common_prefix(a: str, b: str) -> str:
    pairs = enumerate(zip(a, b, strict=False))
    return a[: next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))]


def _common_suffix(a: str, b: str) -> str:
    return _common_prefix(a[::-1], b[::-1])[::-1]
