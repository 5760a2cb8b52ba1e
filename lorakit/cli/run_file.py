"""Carried out of lorakit/cli.py."""

import re
from pathlib import Path
from typing import Any

import lorakit as lk


def read_run_file(path: Path, overrides: list[str]) -> dict[str, Any]:
    try:
        values = _yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise lk.LorakitError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise lk.LorakitError(f"{path} must hold a mapping of names to values")
    for override in overrides:
        *parents, leaf = override.partition("=")[0].split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise lk.LorakitError(f"{override!r}: {parent} is not a mapping in {path}")
        target[leaf] = yaml_value(override)
    return values


def yaml_value(override: str) -> Any:
    """What follows the = of key=value, as YAML reads it."""
    try:
        return _yaml(override.partition("=")[2])
    except ValueError:
        raise lk.LorakitError(f"{override!r}: the value is not valid YAML") from None


def _yaml(text: str) -> Any:
    """The value of YAML text, with 2e-4 a number as in YAML 1.2. Raises ValueError, for a key that
    a mapping holds twice too.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value if isinstance(key.value, str)]
            for name in names:
                if names.count(name) > 1 and name != "<<":
                    raise ValueError(f"{name} is given twice: keep one")
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # the constructors of tags, as in `!!bool x`, raise anything
        raise ValueError(error) from None
