"""The records of JSONL, CSV and Parquet files.

The readers of JSONL and CSV start at any byte where a record starts, given its line for messages,
and tell where each record starts: what is kept of a file is a number, not a record. Lines end with
\\n. CSV is RFC 4180, strictly: a quote that is not closed is an error, not a record of a gigabyte.
"""

import csv
from codecs import BOM_UTF8 as BOM
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lorakit.config.errors import LorakitError
from lorakit.data.schemas import parse_json


class Record(NamedTuple):
    start: int  # in bytes
    line: int  # counted from 1
    content: Any  # for `value` of the reader to make sense of


class JsonLines:
    """The objects of a JSONL file."""

    def __init__(self, path: Path):
        self.path = path

    def header(self, file: BinaryIO) -> tuple[int, int]:
        """Where the first record may start, and its line."""
        return 0, 1

    def records(self, file: BinaryIO, start: int, line: int) -> Iterator[Record]:
        """Those from where `file` stands: at byte `start`, on `line`."""
        for raw in file:
            if raw.removeprefix(BOM).strip():
                yield Record(start, line, raw)
            start, line = start + len(raw), line + 1

    def value(self, record: Record) -> Any:
        place = f"{self.path} line {record.line}"
        return parse_json(decoded(record.content, record.start, place), place)


class CsvRecords:
    """The records of a CSV file, as mappings from the names in its header; else as JsonLines."""

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        csv.field_size_limit(2**31 - 1)  # of the whole process; the default is 128 KiB

    def header(self, file: BinaryIO) -> tuple[int, int]:
        for _, _, names, end, after in self._fields(file, 0, 1):
            if isinstance(names, LorakitError):
                raise names
            self.names = names
            twice = [name for name in self.names if self.names.count(name) > 1]
            if twice:
                raise LorakitError(f"{self.path} line 1: two columns are called {twice[0]!r:.60}")
            return end, after
        return 0, 1

    def records(self, file: BinaryIO, start: int, line: int) -> Iterator[Record]:
        for first, number, fields, _, _ in self._fields(file, start, line):
            yield Record(first, number, fields)

    def value(self, record: Record) -> dict[str, str]:
        if isinstance(record.content, LorakitError):
            raise record.content
        if len(record.content) != len(self.names):
            raise LorakitError(
                f"{self.path} line {record.line}: {len(record.content)} fields, where the header "
                f"has {len(self.names)}"
            )
        return dict(zip(self.names, record.content, strict=True))

    def _fields(self, file: BinaryIO, start: int, line: int) -> Iterator[tuple]:
        """Where a record starts, its line, its fields or what is wrong with it, and both of what
        follows it.
        """
        end, after = start, line

        def lines() -> Iterator[str]:
            nonlocal end, after
            for raw in file:
                at, number = end, after
                end, after = end + len(raw), after + 1
                yield decoded(raw, at, f"{self.path} line {number}")

        reader = csv.reader(lines(), strict=True)  # takes a line only when it needs one
        while True:
            try:
                fields = next(reader, None)
            except (csv.Error, LorakitError) as error:
                fields = error
                if isinstance(error, csv.Error):
                    fields = LorakitError(f"{self.path} line {line} is not valid CSV: {error}")
                reader = csv.reader(lines(), strict=True)  # goes on with the next line
            if fields is None:
                return
            if fields:
                yield start, line, fields, end, after
            start, line = end, after


class Table:
    """The rows of a Parquet file."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise LorakitError(
                f"{path}: reading Parquet needs pyarrow; install lorakit[parquet]"
            ) from None
        try:
            self.table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise LorakitError(f"{path} is no Parquet file that can be read: {reason}") from None
        self.path = path

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.table.slice(index, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date out of range
            raise LorakitError(f"{self.path} row {index}: {error}") from None


def decoded(raw: bytes, start: int, place: str) -> str:
    """A line as text, without the mark that some programs put at the start of a file."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LorakitError(f"{place} is not UTF-8 text: {error}") from None
    return text.removeprefix("\ufeff") if start == 0 else text
