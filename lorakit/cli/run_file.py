"""Read a run file, which is a YAML mapping, and the key=value arguments that replace its values."""

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
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else "is no file"
        raise lk.LorakitError(
            f"{path} {what}; give the path of a run file, which is YAML and says at least model "
            "and data"
        ) from None
    except UnicodeDecodeError as error:
        raise lk.LorakitError(f"{path} is not valid YAML: {error}") from None
    try:
        values = lk.parse_yaml(text)
    except lk.LorakitError as error:
        raise lk.LorakitError(f"{path} is {error}") from None
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
        return lk.parse_yaml(override.partition("=")[2])
    except lk.LorakitError:
        raise lk.LorakitError(f"{override!r}: the value is not valid YAML") from None
