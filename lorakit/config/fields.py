"""Carried out of lorakit/config.py."""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch

from lorakit.config.errors import LorakitError, check, nearest
from lorakit.kernels.dispatch import DTYPES


def to_dtype(name: str | torch.dtype) -> torch.dtype:
    """A dtype by its torch name; raises LorakitError for one that no model runs in."""
    if name in DTYPES.values():
        return name
    if name not in DTYPES:
        raise LorakitError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _accepts(kind: Any, value: Any) -> bool:
    """Whether `value`, as JSON or YAML reads it, is of the annotated type `kind`."""
    if kind is Any:
        return True
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(arg, value) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_accepts(args[0], item) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            _accepts(args[0], k) and _accepts(args[1], v) for k, v in value.items()
        )
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # no nan
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, kind)


def _type_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in typing.get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _refusal(name: str, kind: Any, value: Any) -> str:
    size = " (too large)" if isinstance(value, int) and abs(value) >= 2**63 else ""
    return f"{name} must be {_type_name(kind)}, not {value!r:.60}{size}"


def from_mapping(cls: type, values: Any, where: str, *, ignore_unknown: bool = False) -> Any:
    """Build dataclass `cls` from a mapping read from a file, named `where` in messages.

    Raises LorakitError for a value that is no mapping, an unknown name (unless ignored), a missing
    required one, or one of the wrong type.
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


def check_types(config: Any) -> None:
    """Raise LorakitError unless every field of a config is of the type that it is declared as."""
    kinds = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        check(_accepts(kinds[f.name], value), _refusal(f.name, kinds[f.name], value))
