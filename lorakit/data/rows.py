"""Rows of training data, from files or from anything that can be iterated over.

    suffix            the file holds                      its rows are
    .jsonl .ndjson    an object per line                  read again whenever they are needed
    .csv .tsv         a header, then a record per row     read again whenever they are needed
    .json             an array, or {"data": an array}     held
                      an object per line                  read again whenever they are needed
    .parquet          a table (needs pyarrow)             held, as the table that pyarrow reads

Each kind but Parquet may be compressed, as .jsonl.gz. Such a file is unpacked once, into a
temporary file that lasts as long as its rows.

A file of lines or records leaves 16 bytes in memory for each row: where the row starts, and its
line. So a file may be larger than memory, at the price of parsing a row each time it is used. An
object that has a length and takes an index, a Hugging Face Dataset for one, is asked for its rows
again too. The rows of a list or a generator are held.

The first pass over the rows checks each of them and notes where it stands. `read_rows` makes that
pass; `encode_rows` (examples.py) encodes in the same one.

The fields of a row tell what it means (formats.py). All rows of a source have one format.
"""

import os
from array import array
from codecs import BOM_UTF8 as BOM
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, overload, runtime_checkable

from lorakit.config.errors import LorakitError
from lorakit.data.check import Check, check_format
from lorakit.data.formats import detect
from lorakit.data.readers import (
    CsvRecords,
    JsonLines,
    Record,
    SourceFile,
    Table,
    decoded,
)
from lorakit.data.schemas import Row, fields_of
from lorakit.data.values import parse_json
from lorakit.files.local import as_path


@runtime_checkable
class Indexed(Protocol):
    """Anything that has a length and takes an index: a list, a Hugging Face Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


DELIMITERS = {".csv": ",", ".tsv": "\t"}

RowSource = str | Path | Iterable[Mapping[str, Any] | Row] | Indexed


class LazyRows(Sequence[Row]):
    """Rows that are fetched when they are asked for. Slices are lists."""

    def fetch(self, index: int) -> Row:
        """Return row number `index`, which is at least 0 and below the length."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """Return where row number `index` came from, as "train.jsonl line 3"."""
        return self.fetch(index).place

    def fields(self, index: int) -> Any:
        """Return the fields of row number `index`, as its source has them where it keeps them."""
        return fields_of(self.fetch(index))

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
    source: RowSource,
    *,
    format: str | None = None,
    errors: list[str] | None = None,
    skip_empty: bool = False,
) -> Sequence[Row]:
    """Return the rows of a file, or of an iterable of mappings, each of them checked.

    The rows of a file of lines, of CSV or of Parquet, or of an object that has a length and takes
    an index, are fetched again each time they are asked for; others are held. Rows that were read
    already are returned as they are, but for those that skip_empty leaves out.

    Args:
        source: The path of a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, all but the last
            perhaps with .gz, an iterable of mappings from field names to values, or an object with
            a length and an index.
        format: One of messages, sharegpt, prompt_completion, preference, alpaca, text,
            unpaired_preference, prompt_only and classification. None takes the format that the
            fields of the first row tell.
        errors: If given, a row that cannot be used is left out and the reason is added to this
            list. If None, such a row raises an error.
        skip_empty: Leave out rows with an answer of no text: an empty output or completion, or an
            empty turn of the assistant. A warning of the logger "lorakit" counts them.

    Returns:
        A sequence of rows. Each has a `place`, as "train.jsonl line 3".

    Raises:
        LorakitError: The file is missing or of another kind, a row does not have the format of the
            first one, or there are no rows.
    """
    rows = unread_rows(source, format=format, errors=errors, skip_empty=skip_empty)
    if isinstance(rows, SourceRows) and not rows.complete:
        for _ in rows:
            pass
    return rows


def unread_rows(
    source: RowSource,
    *,
    format: str | None = None,
    errors: list[str] | None = None,
    skip_empty: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Sequence[Row]:
    """Return rows as `read_rows` does; but those of a `SourceRows` wait for the first pass.

    The arguments are those of `read_rows`; `columns` has the field that holds what a field of a
    format should. Raises LorakitError as `read_rows` does, in the first pass too.
    """
    check_format(format)
    if isinstance(source, LazyRows) and not skip_empty:
        return source
    if isinstance(source, (str, Path)):
        return _file_rows(source, Check(str(source), format, errors, skip_empty, columns))
    return _other_rows(source, Check("data", format, errors, skip_empty, columns))


def _other_rows(source: Any, check: Check) -> Sequence[Row]:
    if isinstance(source, Mapping):
        raise LorakitError(
            f"data is a mapping of {', '.join(map(str, source)) or 'nothing'}, not rows; "
            "take one of its values"
        )
    if isinstance(source, Indexed) and not isinstance(source, (list, tuple)):
        return IndexedRows(source, "row", check)
    if not isinstance(source, Iterable):
        raise LorakitError(f"data must be a file or an iterable of rows, not {source!r:.60}")
    return _held(source, "row", check)


def _same(value: Any) -> Any:
    return value


def _held(values: Iterable[Any], name: str, check: Check) -> list[Row]:
    rows: list[Row] = []
    for i, value in enumerate(values):
        row = check.row(partial(_same, value), f"{name} {i}")
        if row is not None:
            rows.append(row)
    check.end(len(rows))
    return rows


class SourceRows(LazyRows):
    """Rows that stay in their source. The first pass over all of them checks each.

    `complete` says that this pass is over. Before, they have no length and cannot be fetched.
    """

    def __init__(self, check: Check):
        self.check, self.complete = check, False

    def __iter__(self) -> Iterator[Row]:
        if self.complete:
            yield from self._again()
            return
        yield from self._first_pass()
        self.check.end(len(self))
        self.complete = True

    def _first_pass(self) -> Iterator[Row]:
        """Check the rows, note where each good one stands, and yield it."""
        raise NotImplementedError

    def _again(self) -> Iterator[Row]:
        return map(self.fetch, range(len(self)))


class IndexedRows(SourceRows):
    """Rows of an object that has a length and takes an index, which is asked again for each."""

    def __init__(self, values: Indexed, name: str, check: Check):
        super().__init__(check)
        self.values, self.name = values, name
        self.numbers = array("q")

    def __len__(self) -> int:
        return len(self.numbers)

    def fetch(self, index: int) -> Row:
        number = self.numbers[index]
        return self.check.again(self._value(number), f"{self.name} {number}")

    def fields(self, index: int) -> Any:
        return self._value(self.numbers[index])

    def _first_pass(self) -> Iterator[Row]:
        self.numbers = array("q")
        for i in range(len(self.values)):
            row = self.check.row(partial(self._value, i), f"{self.name} {i}")
            if row is not None:
                self.numbers.append(i)
                yield row

    def _value(self, number: int) -> Any:
        try:
            return self.values[number]
        except (KeyError, IndexError):  # a table of pandas has its columns under such an index
            raise LorakitError(
                f"data of type {type(self.values).__name__} has no rows under 0, 1, ...; give an "
                "iterable of mappings"
            ) from None


def place_of(rows: Sequence[Row], index: int) -> str:
    """Return where row number `index` came from. Rows of a file of lines are not read for it."""
    return rows.place(index) if isinstance(rows, LazyRows) else rows[index].place


def fields_at(rows: Sequence[Row], index: int) -> Any:
    """Return the fields of row number `index`, as its source has them where it keeps them."""
    return rows.fields(index) if isinstance(rows, LazyRows) else fields_of(rows[index])


# ---- files --------------------------------------------------------------------------------------


def _file_rows(source: str | Path, check: Check) -> Sequence[Row]:
    path = as_path(source)
    if path.is_dir():
        raise LorakitError(f"{path} is a directory; a file of rows is wanted")
    if not path.exists():
        raise LorakitError(f"{path} does not exist")
    if not path.is_file():
        raise LorakitError(f"{path} is no regular file, and its rows could not be read again")
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if name.endswith(".parquet"):
        return IndexedRows(Table(path), f"{path} row", check)
    if kind == ".json":
        return _json_rows(SourceFile(path), check)
    if kind in DELIMITERS:
        return FileRows(SourceFile(path), CsvRecords(path, DELIMITERS[kind]), check)
    if kind in (".jsonl", ".ndjson", ""):
        return FileRows(SourceFile(path), JsonLines(path), check)
    raise LorakitError(
        f"{path}: files of kind {path.suffix!r} are not read; .jsonl, .json, .csv, .tsv, each "
        "perhaps with .gz, and .parquet are"
    )


class FileRows(SourceRows):
    """Rows of a file of lines or records, which is opened again to fetch one.

    Raises LorakitError, when a row is fetched, if the file was changed after it was read.
    """

    def __init__(self, file: SourceFile, reader: JsonLines | CsvRecords, check: Check):
        super().__init__(check)
        self.file, self.path, self.reader = file, file.path, reader
        self.starts, self.lines = array("q"), array("q")
        self.version = (0, 0)

    def __len__(self) -> int:
        return len(self.starts)

    def fetch(self, index: int) -> Row:
        return self._row(self._record(index))

    def fields(self, index: int) -> Any:
        return self.reader.value(self._record(index))

    def place(self, index: int) -> str:
        return f"{self.path} line {self.lines[index]}"

    def _first_pass(self) -> Iterator[Row]:
        reader = self.reader
        self.starts, self.lines = array("q"), array("q")
        with self.file.open() as file:
            self.version = _version(file)
            start, line = reader.header(file)
            file.seek(start)
            for record in reader.records(file, start, line):
                value = partial(reader.value, record)
                row = self.check.row(value, f"{self.path} line {record.line}")
                if row is not None:
                    self.starts.append(record.start)
                    self.lines.append(record.line)
                    yield row
            self._check_unchanged(file)

    def _again(self) -> Iterator[Row]:
        number = 0
        for record in self._records(0):
            if number < len(self) and record.start == self.starts[number]:
                yield self._row(record)
                number += 1

    def _record(self, index: int) -> Record:
        for record in self._records(index):
            return record
        raise LorakitError(f"{self.path} was cut off after it was read; read it again")

    def _records(self, index: int) -> Iterator[Record]:
        """Yield the records from row number `index` to the end of the file."""
        with self.file.open() as file:
            self._check_unchanged(file)
            file.seek(self.starts[index])
            yield from self.reader.records(file, self.starts[index], self.lines[index])

    def _check_unchanged(self, file: BinaryIO) -> None:
        if _version(file) != self.version:
            raise LorakitError(f"{self.path} was changed after it was read; read it again")

    def _row(self, record: Record) -> Row:
        return self.check.again(self.reader.value(record), f"{self.path} line {record.line}")


def _version(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _json_rows(file: SourceFile, check: Check) -> Sequence[Row]:
    """Return the rows of a .json file: an array, an array under "data", or an object per line."""
    path = file.path
    with file.open() as opened:
        lines = (raw for raw in opened if raw.removeprefix(BOM).strip())
        first, second = next(lines, b""), next(lines, None)
    alone = _object_of(first, path)
    if alone is not None and (second is not None or _tells_a_format(alone)):
        return FileRows(file, JsonLines(path), check)
    with file.open() as opened:
        values = parse_json(decoded(opened.read(), 0, str(path)), str(path))
    what = type(values).__name__
    if isinstance(values, Mapping):
        what = f"an object with {', '.join(values) or 'nothing':.200}"
        if _tells_a_format(values):
            values = [values]
        elif isinstance(values.get("data"), list):
            values = values["data"]
    if not isinstance(values, list):
        raise LorakitError(
            f"{path} must hold rows in one JSON array, in an array under 'data', or as an object "
            f"per line, not {what}"
        )
    return IndexedRows(values, f"{path} item", check)


def _object_of(line: bytes, path: Path) -> Mapping[str, Any] | None:
    """Return the object that a line holds, or None if it holds something else or a part of one."""
    if not line.removeprefix(BOM).lstrip().startswith(b"{"):
        return None
    try:
        value = parse_json(decoded(line, 0, str(path)), str(path))
    except LorakitError:
        return None
    return value if isinstance(value, Mapping) else None


def _tells_a_format(value: Mapping[str, Any]) -> bool:
    try:
        detect(value, "")
    except LorakitError:
        return False
    return True
