"""What goes of a row that has too many tokens.

A chat loses its oldest exchanges first, and the messages of the system stay before the rest:

    system | user, assistant | user, assistant | user, assistant      three exchanges
    system |                                   | user, assistant      cut before message 5

If that is not enough, and of a row that is no chat, what follows the last label goes, then the
start of the prompt, and then the end of what is learned. The head, which is the BOS token, stays.
"""

from typing import NamedTuple

from lorakit.data.messages import is_learned
from lorakit.data.schemas import Chat


class Uncut(NamedTuple):
    """The tokens of a row before they are cut to length.

    The first `head` tokens always stay. The cut takes the tokens after them first, up to `prompt`,
    where the first label is.
    """

    input_ids: list[int]
    labels: list[int]
    head: int
    prompt: int


def _first_message(row: Chat) -> int:
    """Return the number of the first message that is not the system's."""
    roles = [message["role"] for message in row.messages]
    return next((i for i, r in enumerate(roles) if r not in ("system", "developer")), 0)


def cuts_of(row: Chat) -> list[int]:
    """Return the messages before which a chat may be cut: its oldest exchange ends at the first.

    An answer to learn stays behind each of them. Where a prompt precedes all that is learned, all
    of that stays.
    """
    roles = [message["role"] for message in row.messages]
    answers = [i for i, role in enumerate(roles) if role == "assistant"]
    start, gone, cuts = _first_message(row), 0, []
    last = max((i for i in answers if is_learned(row.messages[i])), default=0)
    for then in (i for i in range(start + 1, last) if roles[i] == "user"):
        if gone < row.first < then:
            break
        cuts.append(then)
        gone = then - start
    return cuts


def without_oldest(row: Chat, then: int) -> Chat:
    """Return a chat without its exchanges before message `then`."""
    start = _first_message(row)
    messages = row.messages[:start] + row.messages[then:]
    return row._replace(messages=messages, first=max(row.first - (then - start), 0))


def _needed(uncut: Uncut) -> int:
    """Return how many tokens must stand before the first label: the head, but at least one."""
    return max(uncut.head, min(uncut.prompt, 1))


def first_kept(uncut: Uncut, limit: int) -> int:
    """Return the first token after the head from which on all that is learned fits `limit`."""
    _, labels, head, prompt = uncut
    learned = max((t + 1 for t, label in enumerate(labels) if label >= 0), default=len(labels))
    end = min(learned, prompt + limit - _needed(uncut))
    return max(head, prompt - (limit - head - (end - prompt)))


def cut(uncut: Uncut, start: int, limit: int) -> Uncut:
    """Return the head, and what follows from token `start` on, at most `limit` tokens in all.

    Two answers may split the end of their prompt into other tokens, so `start`, which serves both,
    may lie behind the first label of one. Then it stays before that. Where what follows begins with
    the head again, as turns do in some templates, the head stands once.
    """
    ids, labels, head, prompt = uncut
    start = min(start, prompt - (_needed(uncut) - head))
    if head < start < prompt and head and ids[start] == ids[head - 1]:
        start += 1
    kept = [*range(head), *range(start, min(len(ids), start + limit - head))]
    return Uncut([ids[t] for t in kept], [labels[t] for t in kept], head, prompt - start + head)
