"""Carried out of lorakit/config.py."""

import re
import typing
from collections.abc import Mapping
from typing import Any


def valid_regex(pattern: str) -> bool:
    """Whether it can be matched, also as a group of a larger one."""
    try:
        re.compile(f"({pattern})")
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def endings(names: typing.Iterable[str]) -> set[str]:
    """All that follows a dot in one of them."""
    return {name[i + 1 :] for name in names for i, sign in enumerate(name) if sign == "."}


def each_alone(values: Mapping[str, Any], names: typing.Iterable[str]) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern of values by layer: every entry means, of the layers `names`,
    one alone. A bare name, which every reader of the file knows, would also mean a layer whose name
    ends so after a dot; a ^ before it ends that.
    """
    unclear = endings(names)
    return {f"^{name}" if name in unclear else name: value for name, value in values.items()}


def in_pattern(key: str, name: str) -> bool:
    """Whether an entry of rank_pattern or alpha_pattern means the layer called `name`."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def of_pattern(pattern: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first entry of a rank_pattern or alpha_pattern that means layer `name`."""
    return next((value for key, value in pattern.items() if in_pattern(key, name)), otherwise)


def lies_in(name: str, module: str) -> bool:
    """Whether `module` is `name` itself, a module that holds it, or a part of its path.

    Names are paths of dots: "mlp" and "layers.1" hold "model.layers.1.mlp.up_proj".
    """
    return f".{module}." in f".{name}."
