"""Check the fields of settings, and build settings from a mapping that a file holds.

Settings are frozen dataclasses. The annotation of a field says what the field may hold:
`from_mapping` checks a file against it, and `check_types` checks what Python code gives. An error
names the field, its type and the value. An unknown name is an error that says the nearest valid
one. Nothing is converted in silence: "8" is no number, true is no number, and a number that an
int64 or a float cannot hold is refused.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch

from lorakit.config.errors import LorakitError, nearest, one_of
from lorakit.kernels.dispatch import DTYPES, FLOATS


class Dataclass(Protocol):
    """Any dataclass, for type checkers."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Settings = TypeVar("Settings", bound=Dataclass)


def to_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype that a name means, or a dtype as it is.

    Raises LorakitError for a dtype that no model computes in.
    """
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in FLOATS:
        raise LorakitError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return dtype


def from_mapping(
    cls: type[Settings], values: Any, where: str, *, ignore_unknown: bool = False
) -> Settings:
    """Build settings from a mapping that was read from a file.

    Args:
        cls: The dataclass of the settings.
        values: The mapping of its field names to their values.
        where: The name of the mapping in messages, as in "run.yaml, lora".
        ignore_unknown: Pass over names that are no fields, instead of refusing them.

    Returns:
        The settings, an instance of `cls`.

    Raises:
        LorakitError: `values` is no mapping, a name is unknown, a field without a default is
            missing, or a value is not of its field's type or range.
    """
    if not isinstance(values, Mapping):
        raise LorakitError(f"{where} must be a mapping of names to values, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [name for name in values if name not in fields]
    if unknown and not ignore_unknown:
        raise LorakitError(f"{where}: unknown key {unknown[0]!r}{nearest(unknown[0], fields)}")
    kinds = typing.get_type_hints(cls)
    known = {name: value for name, value in values.items() if name in fields}
    for name, value in known.items():
        if not _accepts(kinds[name], value):
            raise LorakitError(f"{where}: {_refusal(name, kinds[name], value)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in known:
            raise LorakitError(f"{where}: {name} is missing")
    try:
        return cls(**known)
    except LorakitError as error:
        raise LorakitError(f"{where}: {error}") from None


def without_unset(cls: type[Dataclass], values: Any) -> Any:
    """Return a mapping of fields of `cls` without the nulls that mean "not set".

    These are the nulls of fields that have a default and cannot be null. What is no mapping is
    returned as it is, for `from_mapping` to refuse.
    """
    if not isinstance(values, Mapping):
        return values
    kinds, missing = typing.get_type_hints(cls), dataclasses.MISSING
    unset = {
        f.name
        for f in dataclasses.fields(cls)
        if (f.default is not missing or f.default_factory is not missing)
        and not _accepts(kinds[f.name], None)
    }
    return {name: v for name, v in values.items() if v is not None or name not in unset}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return base with the values of another mapping laid over it, those of mappings in it too."""
    result = dict(base)
    for key, value in over.items():
        before = result.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = merged(before, value)
        result[key] = value
    return result


def check_types(settings: Dataclass, names: Iterable[str] | None = None) -> None:
    """Check that the fields of settings hold what their annotations say.

    Args:
        settings: An instance of a dataclass.
        names: The fields to check; None means all.

    Raises:
        LorakitError: A field does not.
    """
    kinds = typing.get_type_hints(type(settings))
    for name in [f.name for f in dataclasses.fields(settings)] if names is None else names:
        value = getattr(settings, name)
        if not _accepts(kinds[name], value):
            raise LorakitError(_refusal(name, kinds[name], value))


def check_positive(settings: Dataclass, *names: str, or_null: bool = False) -> None:
    """Raise LorakitError unless each of these fields is above 0, or None if `or_null` is set."""
    for name in names:
        value = getattr(settings, name)
        if not (or_null and value is None) and value <= 0:
            kind = "positive or null" if or_null else "positive"
            raise LorakitError(f"{name} must be {kind}, not {value}")


def check_below_one(settings: Dataclass, *names: str) -> None:
    """Raise LorakitError unless each of these fields is in [0, 1)."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value < 1:
            raise LorakitError(f"{name} is {value}; it must be in [0, 1)")


def check_share(settings: Dataclass, *names: str) -> None:
    """Raise LorakitError unless each of these fields is in [0, 1]."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise LorakitError(f"{name} is {value}; it must be in [0, 1]")


def _accepts(kind: Any, value: Any) -> bool:
    """Say whether `value`, as JSON or YAML reads it, is of the annotated type `kind`."""
    if kind is Any:
        return True
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(arg, value) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_accepts(args[0], item) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            _accepts(args[0], key) and _accepts(args[1], item) for key, item in value.items()
        )
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # no NaN
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, kind)


def _refusal(name: str, kind: Any, value: Any) -> str:
    """Return the sentence that says why a field of type `kind` cannot hold `value`."""
    choices = _choices(kind)
    if choices:
        return f"{name} is {value!r:.60}; choose {one_of(choices)}"
    size = " (too large)" if isinstance(value, int) and abs(value) >= 2**63 else ""
    if isinstance(value, list) and value and all(_accepts(kind, item) for item in value):
        size = "; in a run file, `sweep` tries each value of a list"
    return f"{name} must be {_type_name(kind)}, not {value!r:.60}{size}"


def _choices(kind: Any) -> list[str]:
    """Return the values that a Literal allows, "null" among them if it may be None.

    A list of such values, or one of them, has the same choices. Other types have none.
    """
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    parts = [arg for arg in typing.get_args(kind) if arg is not type(None)] if is_union else [kind]
    literals = {
        typing.get_args(part)[0] if is_union and typing.get_origin(part) is list else part
        for part in parts
    }
    literal = literals.pop()
    if literals or typing.get_origin(literal) is not Literal:
        return []
    names = [str(choice) for choice in typing.get_args(literal)]
    return [*names, "null"] if is_union and type(None) in typing.get_args(kind) else names


def _type_name(kind: Any) -> str:
    """Return a type as messages name it, with "null" for None."""
    if kind is types.NoneType:
        return "null"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
