"""Makes rows of the fields of a source, and decides what becomes of those that cannot be used."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from lorakit.config.errors import LorakitError, nearest
from lorakit.data.formats import FORMATS, detect, make_row
from lorakit.data.schemas import Row, has_empty_answer
from lorakit.data.values import EmptyAnswer

log = logging.getLogger("lorakit")


def check_format(format: str | None) -> None:
    """Raise LorakitError if a name is that of no format."""
    if format is not None and format not in FORMATS:
        raise LorakitError(
            f"format is {format!r}{nearest(format, FORMATS)}; choose one of {', '.join(FORMATS)}"
        )


class Check:
    """Makes the rows of one source, and decides what becomes of those that cannot be used.

    `name` is that of the source; the other arguments are those of `unread_rows`. `format` becomes
    that of the first row.
    """

    def __init__(
        self,
        name: str,
        format: str | None,
        errors: list[str] | None,
        skip_empty: bool,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.columns = columns or {}
        self.name, self.format, self.errors, self.skip_empty = name, format, errors, skip_empty
        self.empty = 0

    def row(self, value: Callable[[], Any], place: str) -> Row | None:
        """Return the row that `value` returns the fields of, or None if it is left out.

        Raises LorakitError for a row that cannot be used, unless the errors are collected.
        """
        try:
            fields = self._renamed(value(), place)
            self.format = self.format or detect(fields, place)
            row = make_row(fields, place, self.format)
            if self.skip_empty and has_empty_answer(row):
                raise EmptyAnswer(f"{place} has an empty answer")
            return row
        except LorakitError as error:
            if self.skip_empty and isinstance(error, EmptyAnswer):
                self.empty += 1
            elif self.errors is None:
                raise
            else:
                self.errors.append(str(error))
        return None

    def again(self, fields: Any, place: str) -> Row:
        """Return the row of fields that were checked before."""
        return make_row(self._renamed(fields, place), place, self.format)

    def _renamed(self, fields: Any, place: str) -> Any:
        """Return fields under the names that the format has for them.

        Raises LorakitError if a column is missing.
        """
        if not self.columns or not isinstance(fields, Mapping):
            return fields
        for column in self.columns.values():
            if column not in fields:
                near = nearest(column, map(str, fields))
                raise LorakitError(f"{place} has no column {column!r}{near}")
        taken = set(self.columns.values())
        others = {name: value for name, value in fields.items() if name not in taken}
        return others | {name: fields[column] for name, column in self.columns.items()}

    def end(self, count: int) -> None:
        """Say how many rows were left out beside `count` good ones; LorakitError if that is 0."""
        if not count:
            nothing = f"{self.name} holds no rows" + " but empty ones" * (self.empty > 0)
            raise LorakitError(self.errors[0] if self.errors else nothing)
        if self.empty:
            log.warning(
                "lorakit: %s: %d of %d rows have an empty answer and were left out",
                self.name,
                self.empty,
                self.empty + count + len(self.errors or ()),
            )
