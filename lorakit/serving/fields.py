"""The fields of a JSON object, each taken with its type and its range checked.

null counts as absent, as it does in OpenAI's protocol. A field of the wrong type is refused before
anything is computed, so no request ends in an exception. `finish` looks at what nobody took. A name
that is nearly one of the known fields is a slip, and refused; others are ignored, since clients
send fields of other servers too.
"""

import json
import math
from difflib import get_close_matches
from typing import Any, TypeVar

from lorakit.config.errors import one_of
from lorakit.serving.refusals import Refusal

T = TypeVar("T")

_NAMES = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "decimal",
    list: "array",
    dict: "object",
    type(None): "null",
}
_SLIP = 0.85
"""How near a name is to a known one, by difflib, for it to be a slip: top_P, max_token."""


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in the body of a request; refuse what is none."""

    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no number of JSON")

    try:
        values = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"The body of the request is no JSON: {error}.") from None
    if not isinstance(values, dict):
        raise Refusal(400, f"The body of the request is no JSON object, but {_a(values)}.")
    return values


def _a(value: object) -> str:
    name = _NAMES[type(value)]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}" if name != "null" else name


class Fields:
    """The fields of one object; each method takes one by its name."""

    def __init__(self, values: dict[str, Any], where: str = ""):
        """Hold the fields.

        Args:
            values: The JSON object.
            where: The path of the object in the request, for messages: "messages[0].".
        """
        self.values, self.where = values, where
        self.known: set[str] = set()

    def refusal(self, name: str, message: str, code: str = "invalid_value") -> Refusal:
        """Return the refusal of a field."""
        return Refusal(400, message, param=f"{self.where}{name}", code=code)

    def take(self, name: str, kind: type[T]) -> T | None:
        """Return a field of a type, None if it is absent; refuse one of another type."""
        self.known.add(name)
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not kind:
            raise self.wrong_type(name, kind)
        return value

    def wrong_type(self, name: str, *kinds: type) -> Refusal:
        """Return the refusal of a field that is of none of these types."""
        names = one_of([_a(kind()) for kind in kinds])
        return self.refusal(
            name,
            f"Invalid type for '{self.where}{name}': expected {names}, but got "
            f"{_a(self.values.get(name))} instead.",
            "invalid_type",
        )

    def needed(self, name: str, kind: type[T]) -> T:
        """Return a field of a type; refuse its absence."""
        value = self.take(name, kind)
        if value is None:
            raise self.missing(name)
        return value

    def missing(self, name: str) -> Refusal:
        """Return the refusal of an object that lacks a field."""
        message = f"Missing required parameter: '{self.where}{name}'."
        return self.refusal(name, message, "missing_required_parameter")

    def flag(self, name: str) -> bool:
        """Return a boolean, False if it is absent."""
        return bool(self.take(name, bool))

    def whole(self, name: str, low: int, high: int) -> int | None:
        """Return an integer in [low, high], None if it is absent."""
        value = self.take(name, int)
        if value is not None:
            self._in_range(name, value, low, high, "integer")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """Return a number in [low, high]."""
        self.known.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise self.wrong_type(name, float)
        self._in_range(name, value, low, high, "decimal")
        return float(value)

    def _in_range(self, name: str, value: float, low: float, high: float, kind: str) -> None:
        if low <= value <= high:
            return
        above = value > high
        bound = high if above else low
        limit = f"{'<=' if above else '>='} {bound:g}" if math.isfinite(bound) else ""
        raise self.refusal(
            name,
            f"Invalid '{self.where}{name}': {kind} {'above maximum' if above else 'below minimum'} "
            f"value. Expected a value {limit}, but got {str(value)[:30]} instead.",
            f"{kind}_{'above_max' if above else 'below_min'}_value",
        )

    def neutral(self, allowed: dict[str, tuple[object, ...]]) -> None:
        """Refuse fields that lorakit does not have, unless they have a value that changes nothing.

        Args:
            allowed: The fields, each with its values that change nothing beside null.
        """
        for name, values in allowed.items():
            self.known.add(name)
            value = self.values.get(name)
            if value is None or any(type(v) is type(value) and v == value for v in values):
                continue
            but = one_of([json.dumps(each) for each in (*values, None)])
            raise self.refusal(
                name,
                f"Unsupported parameter: '{self.where}{name}' is not supported here: leave it out, "
                f"or set it to {but}.",
                "unsupported_parameter",
            )

    def finish(self) -> None:
        """Refuse a field whose name is nearly a known one."""
        for name in self.values.keys() - self.known:
            close = get_close_matches(name.lower(), self.known, n=1, cutoff=_SLIP)
            if close:
                raise self.refusal(
                    name[:50],
                    f"Unrecognized request argument: '{self.where}{name[:50]}'; did you mean "
                    f"'{close[0]}'?",
                    "unknown_parameter",
                )
