"""Rows of training data, from files or from anything that can be iterated over.

    suffix            the file holds                        its rows are
    .jsonl .ndjson    an object per line                    read again whenever they are needed
    .csv              a header, then a record per row       read again whenever they are needed
    .json             one array of objects                  held
    .parquet          a table (needs pyarrow)               held, as the table that pyarrow reads

A JSONL or CSV file leaves 16 bytes in memory for each row: where the row starts, and its line. So a
file may be larger than memory, at the price of parsing a row each time it is used. An object that
has a length and takes an index, a Hugging Face Dataset for one, is asked for its rows again too.
The rows of a list or a generator are held. Every row is checked once when it is read, however it
is kept.

The fields of a row tell what it means (schemas.py). All rows of a source have one format.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, overload, runtime_checkable

from lorakit.config.errors import LorakitError, nearest
from lorakit.data.readers import CsvRecords, JsonLines, Record, Table, decoded
from lorakit.data.schemas import FORMATS, Row, content_of, detect, make_row, parse_json
from lorakit.files.local import as_path


@runtime_checkable
class Indexed(Protocol):
    """Anything that has a length and takes an index: a list, a Hugging Face Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


RowSource = str | Path | Iterable[Mapping[str, Any] | Row] | Indexed


class LazyRows(Sequence[Row]):
    """Rows that are fetched when they are asked for. Slices are lists."""

    def fetch(self, index: int) -> Row:
        """Return row number `index`, which is at least 0 and below the length."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.fetch(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.fetch(index % len(self))


def read_rows(
    source: RowSource, *, format: str | None = None, errors: list[str] | None = None
) -> Sequence[Row]:
    """Return the rows of a file, or of an iterable of mappings, each of them checked.

    The rows of a JSONL, CSV or Parquet file, or of an object that has a length and takes an index,
    are fetched again each time they are asked for; others are held. Rows that were read already
    are returned as they are.

    Args:
        source: The path of a .jsonl, .ndjson, .csv, .json or .parquet file, an iterable of
            mappings from field names to values, or an object with a length and an index.
        format: One of messages, sharegpt, prompt_completion, preference, alpaca and text. None
            takes the format that the fields of the first row tell.
        errors: If given, a row that cannot be used is left out and the reason is added to this
            list. If None, such a row raises an error.

    Returns:
        A sequence of rows. Each has a `place`, as "train.jsonl line 3".

    Raises:
        LorakitError: The file is missing or of another kind, a row does not have the format of the
            first one, or there are no rows.
    """
    if format is not None and format not in FORMATS:
        raise LorakitError(
            f"format is {format!r}{nearest(format, FORMATS)}; choose one of {', '.join(FORMATS)}"
        )
    if isinstance(source, LazyRows):
        return source
    if isinstance(source, (str, Path)):
        rows, name = _file_rows(source, format, errors), str(source)
    else:
        rows, name = _other_rows(source, format, errors), "data"
    if not rows:
        raise LorakitError(errors[0] if errors else f"{name} holds no rows")
    return rows


@contextmanager
def _noted(errors: list[str] | None) -> Iterator[None]:
    """Add what is wrong with a row in the block to `errors`, or raise it if that is None."""
    try:
        yield
    except LorakitError as error:
        if errors is None:
            raise
        errors.append(str(error))


def _other_rows(source: Any, format: str | None, errors: list[str] | None) -> Sequence[Row]:
    if isinstance(source, Mapping):
        raise LorakitError(
            f"data is a mapping of {', '.join(map(str, source)) or 'nothing'}, not rows; "
            "take one of its values"
        )
    if isinstance(source, Indexed) and not isinstance(source, (list, tuple)):
        try:
            return IndexedRows(source, "row", format, errors)
        except (KeyError, IndexError):  # a table of pandas has its columns under such an index
            raise LorakitError(
                f"data of type {type(source).__name__} has no rows under 0, 1, ...; give an "
                "iterable of mappings"
            ) from None
    if not isinstance(source, Iterable):
        raise LorakitError(f"data must be a file or an iterable of rows, not {source!r:.60}")
    return _held(source, "row", format, errors)


def _held(
    values: Iterable[Any], name: str, format: str | None, errors: list[str] | None
) -> list[Row]:
    rows: list[Row] = []
    for i, value in enumerate(values):
        with _noted(errors):
            format = format or detect(value, f"{name} {i}")
            rows.append(make_row(value, f"{name} {i}", format))
    return rows


class IndexedRows(LazyRows):
    """Rows of an object that has a length and takes an index, which is asked again for each."""

    def __init__(
        self, values: Indexed, name: str, format: str | None, errors: list[str] | None = None
    ):
        self.values, self.name, self.format = values, name, format
        self.numbers = array("q")
        for i in range(len(values)):
            with _noted(errors):
                self.format = self.format or detect(values[i], f"{name} {i}")
                self._row(i)
                self.numbers.append(i)

    def __len__(self) -> int:
        return len(self.numbers)

    def fetch(self, index: int) -> Row:
        return self._row(self.numbers[index])

    def _row(self, number: int) -> Row:
        return make_row(self.values[number], f"{self.name} {number}", self.format)


class SelectedRows(LazyRows):
    """Some of the rows of a sequence, by their numbers."""

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int]):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def fetch(self, index: int) -> Row:
        return self.rows[self.numbers[index]]


# ---- files --------------------------------------------------------------------------------------


def _file_rows(source: str | Path, format: str | None, errors: list[str] | None) -> Sequence[Row]:
    path = as_path(source)
    if path.is_dir():
        raise LorakitError(f"{path} is a directory; a file of rows is wanted")
    if not path.exists():
        raise LorakitError(f"{path} does not exist")
    if not path.is_file():
        raise LorakitError(f"{path} is no regular file, and its rows could not be read again")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _json_rows(path, format, errors)
    if suffix == ".parquet":
        return IndexedRows(Table(path), f"{path} row", format, errors)
    if suffix == ".csv":
        return FileRows(path, CsvRecords(path), format, errors)
    if suffix in (".jsonl", ".ndjson", ""):
        return FileRows(path, JsonLines(path), format, errors)
    raise LorakitError(
        f"{path}: files of kind {suffix!r} are not read; .jsonl, .json, .csv and .parquet are"
    )


class FileRows(LazyRows):
    """Rows of a JSONL or CSV file, which is opened again to fetch one.

    Raises LorakitError, when a row is fetched, if the file was changed after it was read.
    """

    def __init__(
        self,
        path: Path,
        reader: JsonLines | CsvRecords,
        format: str | None,
        errors: list[str] | None = None,
    ):
        self.path, self.reader, self.format = path, reader, format
        self.starts, self.lines = array("q"), array("q")
        with open(path, "rb") as file:
            self.version = _version(file)
            start, line = reader.header(file)
            file.seek(start)
            for record in reader.records(file, start, line):
                with _noted(errors):
                    if self.format is None:
                        self.format = detect(reader.value(record), f"{path} line {record.line}")
                    self._row(record)
                    self.starts.append(record.start)
                    self.lines.append(record.line)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Row]:
        number = 0
        for record in self._records(0) if self.starts else ():
            if number < len(self) and record.start == self.starts[number]:
                yield self._row(record)
                number += 1

    def fetch(self, index: int) -> Row:
        for record in self._records(index):
            return self._row(record)
        raise LorakitError(f"{self.path} was cut off after it was read; read it again")

    def _records(self, index: int) -> Iterator[Record]:
        """Yield the records from row number `index` to the end of the file."""
        with open(self.path, "rb") as file:
            if _version(file) != self.version:
                raise LorakitError(f"{self.path} was changed after it was read; read it again")
            file.seek(self.starts[index])
            yield from self.reader.records(file, self.starts[index], self.lines[index])

    def _row(self, record: Record) -> Row:
        value = self.reader.value(record)
        return make_row(value, f"{self.path} line {record.line}", self.format)


def _version(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _json_rows(path: Path, format: str | None, errors: list[str] | None) -> list[Row]:
    values = parse_json(decoded(path.read_bytes(), 0, str(path)), str(path))
    if not isinstance(values, list):
        raise LorakitError(
            f"{path} must hold one JSON array of rows, not {type(values).__name__}; a file with an "
            "object per line is called .jsonl"
        )
    return _held(values, f"{path} item", format, errors)


# ---- splitting ----------------------------------------------------------------------------------


def content_digest(row: Row) -> bytes:
    """Return 8 bytes that depend on what a row says: BLAKE2b of its canonical JSON.

    They do not depend on where the row stands, or on the kind of file that held it.
    """
    content = [type(row).__name__, *content_of(row)]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()


def split_rows(
    source: RowSource, parts: Sequence[float] = (0.8, 0.1, 0.1), *, format: str | None = None
) -> tuple[Sequence[Row], ...]:
    """Divide rows into parts of about the given shares, each in the old order.

    The part of a row depends on its content only. So new rows move no old ones, and equal rows are
    in one part. The sizes are near the shares, not exactly so, and a part of few rows may be empty.

    Args:
        source: The rows, as `read_rows` takes them.
        parts: The share of each part, from 0 to 1. Their sum is 1.
        format: The format of the rows, as `read_rows` takes it.

    Returns:
        As many sequences of rows as there are parts. They fetch their rows from the source.

    Raises:
        LorakitError: The shares are not from 0 to 1 with a sum of 1, or the rows cannot be read.
    """
    valid = all(isinstance(part, (int, float)) and 0 <= part <= 1 for part in parts)
    if not valid or abs(sum(parts) - 1) > 1e-9:
        raise LorakitError(f"the shares of a split must be from 0 to 1 and sum to 1, not {parts}")
    rows = read_rows(source, format=format)
    numbers = [array("q") for _ in parts]
    last = len(parts) - 1
    for i, row in enumerate(rows):
        at = int.from_bytes(content_digest(row), "big") / 2**64
        chosen = next((p for p in range(last) if at < sum(parts[: p + 1])), last)
        numbers[chosen].append(i)
    return tuple(SelectedRows(rows, chosen) for chosen in numbers)
