"""Read a run file, which is a YAML mapping, and the key=value arguments that replace its values."""

import re
from pathlib import Path
from typing import Any

import lorakit as lk


def read_run_file(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Read a run file, and put overrides in the place of its values.

    Args:
        path: The YAML file.
        overrides: Arguments key=value, or a.b=value for a value within a mapping of the file.

    Returns:
        The mapping of the file, with the overrides in it.

    Raises:
        LorakitError: The file is missing or no YAML mapping, or an override does not fit it.
    """
    try:
        values = _read_yaml(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else "is no file"
        raise lk.LorakitError(
            f"{path} {what}; give the path of a run file, which is YAML and says at least model "
            "and data"
        ) from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise lk.LorakitError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise lk.LorakitError(f"{path} must hold a mapping of names to values")
    put_overrides(values, overrides, str(path))
    return values


def put_overrides(values: dict[str, Any], overrides: list[str], where: str) -> None:
    """Put overrides in the place of a mapping's values; a.b=value goes into a mapping within it.

    Raises LorakitError if an override does not fit; `where` says what the mapping is of.
    """
    for override in overrides:
        *parents, leaf = override.partition("=")[0].split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise lk.LorakitError(f"{override!r}: {parent} is not a mapping in {where}")
        target[leaf] = yaml_value(override)


def yaml_value(override: str) -> Any:
    """Return the value of a key=value argument, read as YAML.

    Raises LorakitError if it is not valid YAML.
    """
    try:
        return _read_yaml(override.partition("=")[2])
    except ValueError:
        raise lk.LorakitError(f"{override!r}: the value is not valid YAML") from None


# 2e-4 is a number in YAML 1.2. PyYAML reads YAML 1.1, in which 2e-4 is a text.
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+")


def _read_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises ValueError if the text is not valid YAML, or a mapping in it holds a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key.value, str)]
            for name in names:
                if names.count(name) > 1 and name != "<<":
                    raise ValueError(f"{name} is given twice: keep one")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # the constructor of a tag, as in `!!bool x`, raises anything
        raise ValueError(error) from None
