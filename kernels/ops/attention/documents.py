"""Documents that lie one after the other along a row, and the tables of tiles that walk over them.

    row      0 1 2 3 4 5 6 7 8 9        lengths 4, 6; tiles of 4
             a a a a b b b b b b
    tiles    first  begin  end          a tile is at most 4 tokens of one document
             0      0      4            [begin, end) is the document that it is a part of
             4      4      10
             8      4      10

A tile begins at its document's first token or a multiple of the tile's size after it. So the bits
of a document do not depend on where it lies. A program of a GPU kernel takes one tile, and those
with the most work come first. Where a table is longer than the tiles need, the rest is zeros, and a
program without tokens ends at once.

`PaddedDocuments` lie in a row of a fixed length, whose documents change from step to step while the
tables keep their memory. So launches that were recorded (a CUDA graph) take the documents of the
moment. What is left of the row is cut into documents of PADDING tokens, since attention's work
grows with the square of a document.
"""

import functools
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import overload

import torch
from torch import Tensor

from ... import dispatch

PADDING = 128  # tokens of a document of padding


class Documents(Sequence[int]):
    """The lengths of the documents along a row, which keep their tables of tiles.

    A table is made when it is first asked for: all layers share it.

    Attributes:
        lengths: The number of tokens of each document.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = tuple(lengths)
        self._tables: dict[tuple[int, bool, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...

    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        return self.lengths[index]

    @property
    def longest(self) -> int:
        """The most tokens that a document may have."""
        return max(self.lengths)

    def tiles(self, size: int, device: torch.device, *, keys: bool = False) -> Tensor:
        """Return the table of tiles of `size` tokens, int32 [n, 3]: first, begin and end.

        The most work comes first: the last queries of a document see the most keys, and its first
        keys are seen by the most queries, which is what `keys` asks for.
        """
        name = size, keys, device
        if name not in self._tables:
            found = torch.tensor(tiles_of(self, size, keys), dtype=torch.int32)
            self._tables[name] = dispatch.sent(found, device)
        return self._tables[name]


def tiles_of(lengths: Sequence[int], size: int, keys: bool) -> list[tuple[int, int, int]]:
    """Return the first token of each tile of `size`, and the bounds of its document."""
    ends = list(accumulate(lengths))
    found = [
        (first, end - length, end)
        for length, end in zip(lengths, ends, strict=True)
        for first in range(end - length, end, size)
    ]
    # stable: equal work stays in the order of the row
    return sorted(found, key=lambda tile: tile[0] - tile[2] if keys else tile[1] - tile[0])


class PaddedDocuments(Documents):
    """The documents of a row of a fixed length, in tables that `refill` overwrites.

    Attributes:
        tokens: The length of the row.
        most: The most documents that the row may hold, those of padding included.
    """

    def __init__(self, tokens: int, most: int):
        super().__init__(_padded([], tokens))
        self.tokens, self.most = tokens, most
        self._starts: dict[torch.device, Tensor] = {}

    @classmethod
    def for_rows(cls, rows: Iterable[Sequence[int]]) -> "PaddedDocuments":
        """Return documents for the shortest row, in whole PADDINGs, that each of `rows` fits in."""
        rows = list(rows)
        tokens = -(-max(sum(row) for row in rows) // PADDING) * PADDING
        return cls(tokens, max(len(_padded(row, tokens)) for row in rows))

    @property
    def longest(self) -> int:
        return self.tokens

    def _first_tokens(self) -> Tensor:
        lengths = torch.tensor(self.lengths)
        return (lengths.cumsum(0) - lengths).repeat_interleave(lengths)

    def filled(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return the lengths, and those of the padding behind them."""
        return _padded(lengths, self.tokens)

    def refill(self, lengths: Sequence[int]) -> None:
        """Take other documents, and write them to the tables there are; the host does not wait."""
        self.lengths = self.filled(lengths)
        for (size, keys, device), table in self._tables.items():
            table.copy_(_pinned(self._rows(size, keys), device), non_blocking=True)
        for device, starts in self._starts.items():
            starts.copy_(_pinned(self._first_tokens(), device), non_blocking=True)

    def tiles(self, size: int, device: torch.device, *, keys: bool = False) -> Tensor:
        name = size, keys, device
        if name not in self._tables:
            self._tables[name] = dispatch.sent(self._rows(size, keys), device)
        return self._tables[name]

    def starts(self, device: torch.device) -> Tensor:
        """Return the first token of the document that each token is of, int64 [tokens]."""
        if device not in self._starts:
            self._starts[device] = dispatch.sent(self._first_tokens(), device)
        return self._starts[device]

    def _rows(self, size: int, keys: bool) -> Tensor:
        """Return the table of tiles in host memory: as many rows as any documents may need."""
        rows = torch.zeros(self.tokens // size + self.most, 3, dtype=torch.int32)
        found = torch.tensor(tiles_of(self, size, keys), dtype=torch.int32)
        rows[: len(found)] = found
        return rows


def _padded(lengths: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Return the lengths, and those of documents of padding up to `tokens`."""
    whole, rest = divmod(tokens - sum(lengths), PADDING)
    return (*lengths, *[PADDING] * whole, *([rest] if rest else []))


def _pinned(t: Tensor, device: torch.device) -> Tensor:
    """Return t where a copy to `device` need not wait for the host."""
    return t.pin_memory() if device.type == "cuda" else t


@functools.lru_cache(maxsize=32)
def equal_documents(rows: int, length: int) -> Documents:
    """Return the documents of a batch of `rows` of one length, laid one after the other."""
    return Documents([length] * rows)
