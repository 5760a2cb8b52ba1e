"""Read a run file, the key=value arguments that replace its values, and the rows that it names."""

import argparse
from pathlib import Path
from typing import Any

import lorakit as lk
from lorakit.cli.arguments import chat_template, take_overrides, tokenizer_of


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a verb that takes a run file, and key=value arguments after it."""
    parser.add_argument("run_file", type=Path, metavar="run.yaml", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="value to use instead of the file's"
    )
    parser.set_defaults(take_rest=take_overrides)


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


# ---- the rows ----


def open_rows(run: "lk.RunConfig", adapter: Path | None) -> tuple[Any, dict[str, Any]]:
    """Return the tokenizer of a run, and its rows before they are encoded, by "train" and so on.

    Raises LorakitError if one of them cannot be read.
    """
    template = chat_template(run.chat_template, adapter)
    tok = lk.load_tokenizer(tokenizer_of(run.model, adapter), chat_template=template)
    tok.add_special_tokens(run.add_tokens)
    return tok, lk.open_data(run.rows, skip_empty=run.train.skip_empty)


def encode_as(settings: "lk.TrainConfig", rows: Any, tok: Any) -> Any:
    """Return rows as a run with these settings encodes them.

    Raises LorakitError if one of them cannot be encoded.
    """
    return lk.encode_rows(
        rows,
        tok,
        max_seq_length=settings.max_seq_length,
        over_length=settings.over_length,
        train_on=settings.train_on,
    )


def rows_of_run(run: "lk.RunConfig", adapter: Path | None) -> tuple[Any, dict[str, Any]]:
    """Return the tokenizer of a run, and its rows as it encodes them, by "train" and "validation".

    Raises LorakitError if one of them cannot be read or encoded.
    """
    tok, rows = open_rows(run, adapter)
    return tok, {name: encode_as(run.train, each, tok) for name, each in rows.items()}
