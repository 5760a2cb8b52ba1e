"""Writes rows into new JSON Lines files, all of them or none."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lorakit.config.errors import LorakitError
from lorakit.data.rows import fields_at, place_of
from lorakit.data.schemas import Row
from lorakit.files.local import as_path, atomic


def write_rows(files: Mapping[str | Path, Sequence[Row]]) -> None:
    """Write rows into new files, one JSON object a line.

    A row of a file has all the fields that it has there, those that lorakit does not read too. The
    files appear when all of them are complete; an error or Ctrl-C before leaves none.

    Args:
        files: The path of each file, which ends in .jsonl, and its rows.

    Raises:
        LorakitError: A file is there already, is named otherwise or gets no rows, a row cannot be
            read again, or holds what JSON has no form for: the bytes, a date or a NaN of Parquet.
    """
    paths = {as_path(path): rows for path, rows in files.items()}
    for path, rows in paths.items():
        if path.suffix != ".jsonl":
            raise LorakitError(f"{path}: rows are written as JSON Lines; name a .jsonl file")
        if path.exists():
            raise LorakitError(f"{path} is there already; name a new file")
        if not len(rows):
            raise LorakitError(f"{path} would have no rows, so nothing was written")
    with ExitStack() as stack:
        for path, rows in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(atomic(path))
            bar = tqdm(range(len(rows)), desc="writing", unit="row", disable=None, leave=False)
            with open(temporary, "wb") as file:
                for i in bar:
                    file.write(_line(fields_at(rows, i), rows, i))


def _line(fields: Any, rows: Sequence[Row], index: int) -> bytes:
    try:
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LorakitError(f"{place_of(rows, index)} cannot be written as JSON: {error}") from None
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can say with an escape alone
        return json.dumps(fields).encode() + b"\n"
