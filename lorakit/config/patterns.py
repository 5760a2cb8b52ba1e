"""Names of layers: rank_pattern and alpha_pattern, and which layer lies in which module.

A pattern maps a key to the rank or the lora_alpha of some layers. A key is PEFT's: the name of a
layer, the end of a name after a dot, or a regex that matches one of these. The first key that means
a layer decides.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def valid_regex(pattern: str) -> bool:
    """Say whether `pattern` is a regex, also as a group of a larger one."""
    try:
        re.compile(f"({pattern})")
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def endings(names: Iterable[str]) -> set[str]:
    """Return every end of a name that follows a dot."""
    return {name[i + 1 :] for name in names for i, sign in enumerate(name) if sign == "."}


def each_alone(values: Mapping[str, Value], names: Iterable[str]) -> dict[str, Value]:
    """Return a rank_pattern or alpha_pattern in which every entry means one layer alone.

    An entry is the bare name of its layer where that is clear, because every reader of the file
    understands a bare name. A bare name also means every layer whose name ends with it after a dot.
    If the adapter has such a layer, a ^ precedes the name.

    Args:
        values: The name of a layer -> its rank or lora_alpha.
        names: The names of all layers that the adapter has.

    Returns:
        The same values by the keys of the pattern.
    """
    unclear = endings(names)
    return {f"^{name}" if name in unclear else name: value for name, value in values.items()}


def in_pattern(key: str, name: str) -> bool:
    """Say whether a key of rank_pattern or alpha_pattern means the layer called `name`."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def of_pattern(pattern: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """Return the value of the first key that means the layer called `name`, or `otherwise`."""
    return next((value for key, value in pattern.items() if in_pattern(key, name)), otherwise)


def lies_in(name: str, module: str) -> bool:
    """Say whether `module` is `name` itself, a module that holds it, or a part of its path.

    Names are paths of dots: "mlp" and "layers.1" hold "model.layers.1.mlp.up_proj".
    """
    return f".{module}." in f".{name}."
