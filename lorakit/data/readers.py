"""The records of JSONL, CSV, TSV and Parquet files, perhaps compressed.

The readers of JSONL and CSV can start at any byte where a record starts. They tell where each
record starts, and its line for messages, so that a caller keeps numbers of a file and no records.
Lines end with a line feed. CSV is read strictly by RFC 4180: a quote that is not closed is an
error, not a record of a gigabyte.
"""

import csv
import gzip
import os
import shutil
import tempfile
import weakref
import zlib
from codecs import BOM_UTF8 as BOM
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lorakit.config.errors import LorakitError
from lorakit.data.values import parse_json


class Record(NamedTuple):
    """A record as a reader finds it. The reader's `value` makes an object of its content."""

    start: int  # in bytes
    line: int  # counted from 1
    content: Any


class _Fields(NamedTuple):
    """A record of CSV, or what is wrong with it; and where the next one starts."""

    start: int
    line: int
    found: list[str] | LorakitError
    next_start: int
    next_line: int


class SourceFile:
    """A file of rows. One that ends in .gz is unpacked into a temporary file, which goes with it.

    Raises LorakitError if such a file is damaged, or there is no room for its content.
    """

    def __init__(self, path: Path):
        self.path = self._content = path
        if path.suffix.lower() == ".gz":
            self._content = _unpacked(path)
            weakref.finalize(self, self._content.unlink, missing_ok=True)

    def open(self) -> BinaryIO:
        """Open the content. Each time gives a file with a place of its own."""
        return open(self._content, "rb")


def _unpacked(path: Path) -> Path:
    """Return a new temporary file with the content of a gzip file."""
    handle, name = tempfile.mkstemp(prefix="lorakit-")
    try:
        with os.fdopen(handle, "wb") as unpacked, gzip.open(path) as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        os.unlink(name)
        raise LorakitError(f"{path} is no gzip file that can be read: {error}") from None
    except OSError as error:
        os.unlink(name)
        raise LorakitError(
            f"{path} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}; TMPDIR may "
            "name a directory with more room"
        ) from None
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


class JsonLines:
    """Reads the objects of a JSONL file."""

    def __init__(self, path: Path):
        self.path = path

    def header(self, file: BinaryIO) -> tuple[int, int]:
        """Return where the first record may start, and its line."""
        return 0, 1

    def records(self, file: BinaryIO, start: int, line: int) -> Iterator[Record]:
        """Yield the records from where `file` stands: at byte `start`, on line `line`."""
        for raw in file:
            if raw.removeprefix(BOM).strip():
                yield Record(start, line, raw)
            start, line = start + len(raw), line + 1

    def value(self, record: Record) -> Any:
        """Return what the record holds. Raises LorakitError if it is not JSON in UTF-8."""
        place = f"{self.path} line {record.line}"
        return parse_json(decoded(record.content, record.start, place), place)


class CsvRecords:
    """Reads the records of a CSV file, as mappings from the names in its header to texts.

    In TSV a tab stands for the comma, with the same quotes, as pandas and spreadsheets write it.
    The methods are those of JsonLines.
    """

    def __init__(self, path: Path, delimiter: str = ","):
        self.path, self.delimiter = path, delimiter
        self.names: list[str] = []
        csv.field_size_limit(2**31 - 1)  # of the whole process; the default is 128 KiB

    def header(self, file: BinaryIO) -> tuple[int, int]:
        """Read the names of the columns. Return where the first record may start, and its line.

        Raises LorakitError if the first line is not valid CSV, or names a column twice.
        """
        header = next(self._fields(file, 0, 1), None)
        if header is None:
            return 0, 1
        if isinstance(header.found, LorakitError):
            raise header.found
        self.names = header.found
        twice = [name for name in self.names if self.names.count(name) > 1]
        if twice:
            raise LorakitError(f"{self.path} line 1: two columns are called {twice[0]!r:.60}")
        return header.next_start, header.next_line

    def records(self, file: BinaryIO, start: int, line: int) -> Iterator[Record]:
        """Yield the records from where `file` stands: at byte `start`, on line `line`."""
        for fields in self._fields(file, start, line):
            yield Record(fields.start, fields.line, fields.found)

    def value(self, record: Record) -> dict[str, str]:
        """Return the fields of a record by name.

        Raises LorakitError if it is not valid CSV, or has more or fewer fields than the header.
        """
        if isinstance(record.content, LorakitError):
            raise record.content
        if len(record.content) != len(self.names):
            raise LorakitError(
                f"{self.path} line {record.line}: {len(record.content)} fields, where the header "
                f"has {len(self.names)}"
            )
        return dict(zip(self.names, record.content, strict=True))

    def _fields(self, file: BinaryIO, start: int, line: int) -> Iterator[_Fields]:
        """Yield records from byte `start`, on line `line`. An error spoils only its own line."""
        end, after = start, line

        def lines() -> Iterator[str]:
            nonlocal end, after
            for raw in file:
                at, number = end, after
                end, after = end + len(raw), after + 1
                yield decoded(raw, at, f"{self.path} line {number}")

        def records() -> Iterator[list[str]]:  # it takes a line only when it needs one
            return csv.reader(lines(), delimiter=self.delimiter, strict=True)

        reader = records()
        while True:
            found: list[str] | LorakitError | None
            try:
                found = next(reader, None)
            except LorakitError as error:
                found = error
            except csv.Error as error:
                found = LorakitError(f"{self.path} line {line} is not valid CSV: {error}")
            if isinstance(found, LorakitError):
                reader = records()  # goes on with the next line
            if found is None:
                return
            if found:
                yield _Fields(start, line, found, end, after)
            start, line = end, after


class Table:
    """Holds the rows of a Parquet file.

    Raises LorakitError if pyarrow is not installed, or cannot read the file.
    """

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
            row: dict[str, Any] = self.table.slice(index, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date out of range
            raise LorakitError(f"{self.path} row {index}: {error}") from None
        return row


def decoded(raw: bytes, start: int, place: str) -> str:
    """Return a line as text, without the mark that some programs put at the start of a file.

    Raises LorakitError, with its place, if the line is not UTF-8.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LorakitError(f"{place} is not UTF-8 text: {error}") from None
    return text.removeprefix("\ufeff") if start == 0 else text
