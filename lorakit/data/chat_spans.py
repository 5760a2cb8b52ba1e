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
model would learn it as if it had never thought. A <think> with which both the header and the
content begin is shown once, in the header.

Rendering a chat of n turns a few times for each turn takes time that grows as n^2. So a long chat
is looked at in parts, each rendered as a chat of its own: a few messages of context, and then those
up to the next answer.

    the chat      <user>a<end><assistant>b<end><user>c<end><assistant>d<end><user>e<end>...
    a part                                     <user>c<end><assistant>d<end><user>e<end>
    its context                                <user>c<end>
    its share                                              <assistant>d<end><user>e<end>

The shares, one after the other, must be the text of the whole chat, to the last character. From
where they are not, messages are looked at within the whole chat.
"""

import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from lorakit.config.errors import LorakitError
from lorakit.models.chat_template import REASONING, Messages

PROBES = ("0123456789", "9876543210")  # contents that differ in every character
LONG = 8  # with more turns of the assistant, the parts cost less than the whole


class Render(Protocol):
    """Renders messages by a chat template, with the header of an answer after them if asked."""

    def __call__(self, messages: Messages, generation_prompt: bool = False) -> str: ...


class _Part(NamedTuple):
    """Messages of a chat, rendered as a chat of their own.

    Those from number `context` on are the messages of the chat from number `first` on. What they
    write stands in the chat's text `shift` characters behind its place in `text`.
    """

    render: Render
    messages: Messages
    text: str
    context: int = 0
    first: int = 0
    shift: int = 0


class RenderedChat:
    """A chat, its text, and where each turn of the assistant stands in it.

    The first of `renders` makes the text; another one renders without the tools, if there are any.
    Each part of a long chat takes the first of them that makes its share of the text, since some
    templates show the tools only before the last question. `special` are the special tokens of the
    tokenizer, as text.
    """

    def __init__(self, renders: Sequence[Render], messages: Messages, special: Collection[str]):
        self.messages, self.text = messages, renders[0](messages)
        self._renders, self._special = renders, special
        self._whole = _Part(renders[0], messages, self.text)
        long = sum(each["role"] == "assistant" for each in messages) > LONG
        self._parts = list(_parts(renders, self._whole)) if long else [self._whole]
        self._firsts = [part.first for part in self._parts]

    def span(self, i: int) -> tuple[int, int]:
        """Return where the assistant's message `i` starts and ends in the text.

        Raises LorakitError if the template leaves that unclear, or leaves out some of the message.
        """
        part = self._parts[bisect_right(self._firsts, i) - 1]
        if part.messages is not self.messages:
            try:
                start, end = _span(part, part.context + i - part.first, self._special)
                return start + part.shift, end + part.shift
            except LorakitError:
                pass  # the whole chat tells what is wrong
        return _span(self._whole, i, self._special)

    def check_shown(self, turns: Iterable[int]) -> None:
        """Raise LorakitError if the text does not hold all that the messages `turns` say."""
        letters = _letters(self.text)
        for i in turns:
            _check_shown(self.messages[i], i, letters, "")

    def left_out(self, checked: set[Any]) -> str | None:
        """Name what the template leaves out, None if it shows all: messages, tool calls, the tools.

        What a template shows depends on the roles, so parts of the same roles are looked at once.
        `checked` remembers them from chat to chat.
        """
        tools = len(self._renders) > 1
        for part in self._parts:
            key = (tools, part.context, _roles(part.messages))
            if key in checked:
                continue
            what = _dropped(part, range(part.context, len(part.messages)))
            if what is not None and part.messages is not self.messages:
                own = range(part.first, part.first + len(part.messages) - part.context)
                what = _dropped(self._whole, own)
            if what is not None:
                return what
            checked.add(key)
        roles = _roles(self.messages)
        if tools and roles not in checked:
            if _tried(self._renders[1], self.messages) == self.text:
                return "the tools"
            checked.add(roles)
        return None


def _roles(messages: Messages) -> tuple[tuple[str, int], ...]:
    """Return the role of each message, and how many tools it calls."""
    return tuple((each["role"], len(each.get("tool_calls") or ())) for each in messages)


# ---- the parts of a long chat ----


def _parts(renders: Sequence[Render], whole: _Part) -> Iterator[_Part]:
    """Yield the parts of a chat. From where they do not make its text, yield the whole chat.

    A part ends before the next answer; if it must, before the next answer to a user, since some
    templates show an answer otherwise once it is complete.
    """
    roles = [each["role"] for each in whole.messages]
    answers = [i for i in range(1, len(roles)) if roles[i] == "assistant" != roles[i - 1]]
    stops = [*answers, len(roles)]
    far_stops = [*(i for i in answers if roles[i - 1] == "user"), len(roles)]
    begin = done = asked = 0
    while begin < len(roles):
        context = _context(whole.messages, asked, begin)
        found = (
            _part(render, whole, context, begin, end[bisect_right(end, begin)], done)
            for end in (stops, far_stops)
            for render in renders
        )
        part = next((each for each in found if each is not None), None)
        if part is None:
            yield whole._replace(context=begin, first=begin)
            return
        yield part
        done, end = part.shift + len(part.text), begin + len(part.messages) - part.context
        asked = max((i for i in range(begin, end) if roles[i] == "user"), default=asked)
        begin = end


def _context(messages: Messages, asked: int, begin: int) -> Messages:
    """Return the messages that the answer from message `begin` on needs before it.

    They are the question, number `asked`, and if a tool spoke last, the call to it too.
    """
    call = begin - 1
    while call > asked and messages[call]["role"] != "assistant":
        call -= 1
    return [messages[asked], *messages[max(call, asked + 1) : begin]] if begin else []


def _part(
    render: Render, whole: _Part, context: Messages, begin: int, end: int, done: int
) -> _Part | None:
    """Return a part, or None if it does not make the text of the chat from place `done` on."""
    messages = [*context, *whole.messages[begin:end]]
    before = _tried(render, context) if context else ""
    text = _tried(render, messages)
    if before is None or text is None or not text.startswith(before):
        return None
    if not whole.text.startswith(text[len(before) :], done):
        return None
    part = _Part(render, messages, text, len(context), begin, done - len(before))
    is_last, reached = end == len(whole.messages), part.shift + len(text)
    return None if is_last and reached < len(whole.text) else part


# ---- within a part, or the whole ----


def _span(chat: _Part, i: int, special: Collection[str]) -> tuple[int, int]:
    """Return where the assistant's message `i` starts and ends in the text of a part.

    Raises LorakitError if the template shows the turn in a way that leaves it unclear, or leaves
    out some of it.
    """
    render, messages, text = chat.render, chat.messages, chat.text
    before = _tried(render, messages[:i], generation_prompt=True)
    after = _tried(render, messages[: i + 1])
    if (
        before is not None
        and after is not None
        and text.startswith(before)
        and text.startswith(after)
        and len(after) > len(before)
    ):
        _check_shown(messages[i], i, _letters(text[len(before) : len(after)]), before)
        return len(before), len(after)

    found = _around_content(render, messages, i)
    if found is None:  # a chat that does not go on without the tools that the turn calls
        _check_shown(messages[i], i, _letters(text), "")
        raise _unclear(messages, i)
    header, tail = found
    start, end = _start(header, before), len(text) - len(tail)
    closing = _closing(render, messages, i, tail, special)
    fits = start <= end and text.startswith(header[:start]) and text.endswith(tail)
    if closing is None or not fits:
        raise _unclear(messages, i)
    if _holds_an_answer(chat, i, end):
        raise LorakitError(
            f"the chat template writes what a tool answered into message {i}; "
            + ("take the content out of that message" if messages[i].get("content") else _TO_ALL)
        )
    _check_shown(messages[i], i, _letters(text[start:end]), text[:start])
    return start, end + len(closing)


_TO_ALL = "use train_on all"


def _unclear(messages: Messages, i: int) -> LorakitError:
    thinks = any(name in messages[i] for name in REASONING)
    return LorakitError(
        f"the chat template shows message {i} in a way that leaves unclear where it starts and "
        f"ends; {_TO_ALL}"
        + (", or set enable_thinking in chat_template_kwargs of the row" if thinks else "")
    )


def _around_content(
    render: Render, messages: Messages, i: int, generation_prompt: bool = False
) -> tuple[str, str] | None:
    """Return the texts before and after the content of message `i`, as two other contents show it.

    Returns None if the template refuses the chat with them.
    """
    one, other = (
        _tried(render, [*messages[:i], probe, *messages[i + 1 :]], generation_prompt)
        for probe in _probes(messages[i])
    )
    if one is None or other is None:
        return None
    return _common_prefix(one, other), _common_suffix(one, other)


def _closing(
    render: Render, messages: Messages, i: int, tail: str, special: Collection[str]
) -> str | None:
    """Return the beginning of `tail` that ends message `i`; None if that is unclear.

    `tail` holds the turn's own end token and then the later turns. The end token alone follows the
    content if the turn is the last one. If that ends in another way, another answer is put behind
    the turn, and what both tails begin with holds the end token.
    """
    last = _around_content(render, messages[: i + 1], i)
    if last is not None and tail.startswith(last[1].rstrip()):
        return last[1].rstrip()
    answers = [*messages[: i + 1], {"role": "assistant", "content": "and"}]
    mark = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    for going_on in (
        _around_content(render, messages[: i + 1], i, generation_prompt=True),
        _around_content(render, answers, i),
    ):
        shared = "" if going_on is None else _common_prefix(tail, going_on[1])
        first = mark.search(shared)
        if first is not None and first.group():
            return shared[: first.end()]
    return None


def _holds_an_answer(chat: _Part, i: int, end: int) -> bool:
    """Return whether the text up to `end`, where message `i` ends, holds what a tool says later."""

    def other(message: dict[str, Any]) -> dict[str, Any]:
        probe = PROBES[message.get("content") == PROBES[0]]
        return {**message, "content": probe} if message["role"] == "tool" else message

    later = chat.messages[i + 1 :]
    if all(message["role"] != "tool" for message in later):
        return False
    changed = _tried(chat.render, [*chat.messages[: i + 1], *map(other, later)])
    return changed is not None and not changed.startswith(chat.text[:end])


def _check_shown(message: dict[str, Any], i: int, shown: str, before: str) -> None:
    """Raise LorakitError unless the letters `shown` hold what message `i` says.

    Case and white space may differ, and the start of the content may stand at the end of the text
    `before`.
    """
    for name in ("content", *REASONING):
        value = message.get(name)
        if not isinstance(value, str):
            continue
        letters = _letters(value)
        if name == "content" and _opened_twice(letters, _letters(before), shown):
            raise LorakitError(
                f"the chat template opens a thought of its own before the one in the content of "
                f"message {i}; put the thought into reasoning_content"
            )
        if letters in shown or (name == "content" and _opened(letters, _letters(before), shown)):
            continue
        raise LorakitError(
            f"the chat template leaves out the {name} of message {i}, or a part of it; if only "
            "since others follow, train on last_turn with a row for each such turn; if in any "
            f"case, take the {name} out of the row"
        )


def _opened(content: str, before: str, shown: str) -> bool:
    """Return whether `content` starts with a mark that ends `before`, and goes on as `shown`."""
    return not content[0].isalnum() and any(
        before.endswith(content[:k]) and shown.startswith(content[k:])
        for k in range(1, len(content))
    )


def _opened_twice(content: str, before: str, shown: str) -> bool:
    """Return whether a thought in the content follows one that the template has opened."""
    opened = before.endswith(("<think>", "<think></think>"))
    return opened and content.startswith("<think>") and content in shown


def _letters(text: str) -> str:
    """Return a text without white space and without capitals."""
    return "".join(text.split()).casefold()


def _start(header: str, before: str | None) -> int:
    """Return where the turn starts: after its header, less what the model writes itself.

    `header` is the text before the content, and `before` the text that generation starts from, None
    if the template refuses to render it. What stands between their ends the model writes (the name
    of gpt-oss' channel). A `before` that the whole chat does not show tells only of white space.
    """
    if before is None:
        return len(header)
    if header.startswith(before):
        return len(before)
    space = header[len(header.rstrip()) :]
    start = len(header)
    while space and not before.endswith(space):
        space, start = space[:-1], start - 1
    return start


def _dropped(chat: _Part, numbers: Iterable[int]) -> str | None:
    """Name one of the messages `numbers` that the template leaves out, or its tool calls.

    A message is left out if the chat renders to its text with any content in its place. Returns
    None if the template shows all.
    """
    messages = chat.messages

    def renders_to_text(i: int, other: dict[str, Any]) -> bool:
        return _tried(chat.render, [*messages[:i], other, *messages[i + 1 :]]) == chat.text

    for i in numbers:
        message = messages[i]
        if all(renders_to_text(i, probe) for probe in _probes(message)):
            return f"message {i}, of role {message['role']!r:.60}"
        calls = message.get("tool_calls") or []
        without = {name: value for name, value in message.items() if name != "tool_calls"}
        if calls and renders_to_text(i, {"content": "", **without}):
            return f"the tool_calls of message {i}"
        for j in range(len(calls)) if len(calls) > 1 else ():
            if renders_to_text(i, {**message, "tool_calls": calls[:j] + calls[j + 1 :]}):
                return f"tool call {j} of message {i}"
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
