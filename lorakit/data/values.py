"""Reads the fields of a row. Each function returns a checked value, or says what else it found.

`place` tells where the row came from, as "train.jsonl line 3", and begins every sentence.
"""

import json
from collections.abc import Mapping
from typing import Any

from lorakit.config.errors import LorakitError, nearest


class EmptyAnswer(LorakitError):
    """A row has no answer to learn, and `skip_empty` would leave it out."""


def parse_json(text: str, place: str) -> Any:
    """Return the value of JSON text. Raises LorakitError, with its place, if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not only bad JSON: numbers of 5000 digits too
        raise LorakitError(f"{place} is not valid JSON: {error}") from None


def without_nulls(value: Any) -> Any:
    """Return a value without the fields that are null.

    In a table all objects of a column have the fields of all the others, null where they have none.
    """
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def has(value: Mapping[str, Any], name: str) -> bool:
    """Return whether a field is there and not null."""
    return value.get(name) is not None


def holds(value: Mapping[str, Any], name: str) -> bool:
    """Return whether a field is there with anything in it: not null, and no empty text or list."""
    item = value.get(name)
    return item is not None and not (isinstance(item, (str, list, tuple, Mapping)) and not item)


def field(value: Mapping[str, Any], name: str, place: str) -> Any:
    """Return what a field holds. Raises LorakitError, with its place, if it is missing."""
    if name not in value:
        raise LorakitError(f"{place}: field {name!r} is missing{nearest(name, map(str, value))}")
    return value[name]


def text_of(value: Mapping[str, Any], name: str, place: str) -> str:
    """Return the text of a field. Raises LorakitError if it is missing or no text."""
    text = field(value, name, place)
    if not isinstance(text, str):
        raise LorakitError(f"{place}: field {name!r} must be text, not {text!r:.60}")
    return text


def filled_text(value: Mapping[str, Any], name: str, place: str) -> str:
    """Return the text of a field that is to be learned.

    Raises LorakitError if it is missing or no text, and EmptyAnswer if it is empty or null.
    """
    if field(value, name, place) in ("", None):
        raise EmptyAnswer(
            f"{place}: the {name} is empty, there is nothing to learn; set skip_empty to leave "
            "such rows out"
        )
    return text_of(value, name, place)


def optional_text(value: Mapping[str, Any], name: str, place: str) -> str:
    """Return the text of a field, "" if it is missing. Raises LorakitError if it is no text."""
    return "" if value.get(name) is None else text_of(value, name, place)


def listed(value: Mapping[str, Any], name: str, place: str) -> list[Any]:
    """Return the list of a field, or of the JSON text that a CSV file or a table has there.

    A field that is missing or holds nothing is an empty list. Raises LorakitError for anything but
    a list.
    """
    items = value.get(name)
    if isinstance(items, str) and items:
        items = parse_json(items, f"{place}, {name}")
    if not items:
        return []
    if not isinstance(items, list):
        raise LorakitError(f"{place}: {name} must be a list, not {items!r:.60}")
    return items
