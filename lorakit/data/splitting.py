"""Divides rows into parts for training, validation and testing.

The part of a row follows from a digest of its content, seen as a number from 0 to 1. So no state is
kept, and no row moves when others come or go.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.data.rows import LazyRows, RowSource, fields_at, place_of, read_rows
from lorakit.data.schemas import Row, content_of


class SelectedRows(LazyRows):
    """Some of the rows of a sequence, by their numbers."""

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int]):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def fetch(self, index: int) -> Row:
        return self.rows[self.numbers[index]]

    def place(self, index: int) -> str:
        return place_of(self.rows, self.numbers[index])

    def fields(self, index: int) -> Any:
        return fields_at(self.rows, self.numbers[index])


def content_digest(row: Row, key: str = "") -> bytes:
    """Return 8 bytes that depend on what a row says, and on a key: BLAKE2b of its canonical JSON.

    They do not depend on where the row stands, or on the kind of file that held it.
    """
    content = [type(row).__name__, *content_of(row)]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode("ascii"), digest_size=8, key=key.encode()).digest()


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
