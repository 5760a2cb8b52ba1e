"""Rows of training data, from files or from anything that can be iterated over.

    suffix            the file holds                        its rows are
    .jsonl .ndjson    an object per line                    read again whenever they are needed
    .csv              a header, then a record per row       read again whenever they are needed
    .json             one array of objects                  held
    .parquet          a table (needs pyarrow)               held, as the table that pyarrow reads

Of a JSONL or CSV file only the place of every row is kept, 16 bytes: where it starts, and its line.
So a file may be larger than memory, at the price of parsing a row each time it is used. Whatever
has a length and takes an index, a Hugging Face Dataset for one, is asked for its rows again too;
the rows of a list or a generator are held. Either way every row is checked once when it is read.

What a row means is told by its fields (formats.py), the same for all rows of a source.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from lorakit.config.errors import LorakitError, nearest
from lorakit.data.readers import CsvRecords, JsonLines, Record, Table, decoded
from lorakit.data.schemas import FORMATS, Row, content_of, detect, make_row, parse_json
from lorakit.files.local import as_path


@runtime_checkable
class Indexed(Protocol):
    """Has a length and takes an index: a list, a Hugging Face Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


Source = str | Path | Iterable[Mapping[str, Any]] | Indexed


class Rows(Sequence[Row]):
    """Rows that are fetched when they are asked for. Slices are lists."""

    def fetch(self, index: int) -> Row:
        """Row number `index`, from 0 to the length."""
        raise NotImplementedError

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.fetch(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.fetch(index % len(self))


def read_rows(
    source: Source, *, format: str | None = None, errors: list[str] | None = None
) -> Sequence[Row]:
    """Rows of a file, or of an iterable of mappings; of `format`, or of the one its fields tell.

    errors: a row that cannot be used is left out, and why is added here, instead of raised.

    Raises LorakitError for a file that is missing or none of the four kinds, a row that is not of
    the format of the first one, or no rows at all.
    """
    if format is not None and format not in FORMATS:
        raise LorakitError(
            f"format is {format!r}{nearest(format, FORMATS)}; choose one of {', '.join(FORMATS)}"
        )
    if isinstance(source, Rows):
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
    """What is wrong with a row goes into `errors`, if that is wanted."""
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
        except (KeyError, IndexError):  # a table of pandas has its columns there
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
    rows = []
    for i, value in enumerate(values):
        with _noted(errors):
            format = format or detect(value, f"{name} {i}")
            rows.append(make_row(value, f"{name} {i}", format))
    return rows


class IndexedRows(Rows):
    """Rows of something that has a length and takes an index."""

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
        value = _without_nulls(self.values[number])
        return make_row(value, f"{self.name} {number}", self.format)


def _without_nulls(value: Any) -> Any:
    """In a table all objects of a column have the fields of all the others: null where they have
    none.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


class Selected(Rows):
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


class FileRows(Rows):
    """Rows of a JSONL or CSV file, which is opened again to fetch one."""

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
        """From row number `index` to the end."""
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
    """8 bytes that depend on what a row says, not on where it stands or what kind of file held it:
    BLAKE2b of its canonical JSON.
    """
    content = [type(row).__name__, *content_of(row)]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()


def split_rows(
    source: Source, parts: Sequence[float] = (0.8, 0.1, 0.1), *, format: str | None = None
) -> tuple[Sequence[Row], ...]:
    """Rows in as many parts as there are shares, which sum to 1, in their old order.

    The part of a row depends on its content only: new rows move no old ones, and equal rows are in
    the same part. So the shares are met about, and a part of few rows may be empty.
    """
    valid = all(isinstance(part, (int, float)) and 0 <= part <= 1 for part in parts)
    if not valid or abs(sum(parts) - 1) > 1e-9:
        raise LorakitError(f"the shares of a split must be from 0 to 1 and sum to 1, not {parts}")
    rows = read_rows(source, format=format)
    numbers = [array("q") for _ in parts]
    for i, row in enumerate(rows):
        at, last = int.from_bytes(content_digest(row), "big") / 2**64, len(parts) - 1
        chosen = next((p for p in range(last) if at < sum(parts[: p + 1])), last)
        numbers[chosen].append(i)
    return tuple(Selected(rows, chosen) for chosen in numbers)
