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
"""

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import overload

import torch
from torch import Tensor

from ... import dispatch


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


@functools.lru_cache(maxsize=32)
def equal_documents(rows: int, length: int) -> Documents:
    """Return the documents of a batch of `rows` of one length, laid one after the other."""
    return Documents([length] * rows)
