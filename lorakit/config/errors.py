"""Carried out of lorakit/config.py."""

import difflib
import typing


class LorakitError(ValueError):
    """Something the caller gave cannot be used. One sentence: what, where, what to do."""


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """' (did you mean ...?)' with the valid name closest to `name`; '' where none is close."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check(condition: bool, message: str) -> None:
    """Raise LorakitError with `message` unless `condition`."""
    if not condition:
        raise LorakitError(message)
