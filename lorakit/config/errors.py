"""The error that lorakit raises for bad input, and helpers that word its message."""

import difflib
from collections.abc import Iterable, Sequence


class LorakitError(ValueError):
    """The caller gave something that cannot be used.

    The message is one sentence. It says what is wrong, where, and what to do.
    """


def nearest(name: object, valid: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the closest valid name, or "" if none is close."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(names: Sequence[str]) -> str:
    """Return names as a sentence offers them: "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def check(condition: bool, message: str) -> None:
    """Raise LorakitError with `message` unless `condition` holds.

    The message is built before the condition is known. Where that costs something, write `if` and
    `raise` instead.
    """
    if not condition:
        raise LorakitError(message)
