"""The arithmetic of CUDA's caching allocator, without a GPU.

torch asks the driver for segments and cuts them into blocks (c10/cuda/CUDACachingAllocator.cpp):

    request     rounded up to 512 bytes
    up to 1 MB  a block of a segment of 2 MB
    below 10 MB a block of a segment of 20 MB
    more        a segment of its own, rounded up to 2 MB

The smallest free block that is large enough is taken, and cut if what is left over is at least 512
bytes in a segment of small blocks, or more than 1 MB elsewhere. A freed block merges with free
neighbours. Segments are returned to the driver only when torch is asked to.

Blocks of one stream are never given to another, nor those of the graphs to what is launched op by
op. Each such set of segments is called an arena here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

GRANULE = 512
SMALL = 1 << 20
MEDIUM, SMALL_SEGMENT, MEDIUM_SEGMENT, ROUND = 10 << 20, 2 << 20, 20 << 20, 2 << 20


def rounded(size: int) -> int:
    """Return the bytes of the block that a request of `size` bytes gets."""
    return -(-size // GRANULE) * GRANULE


@dataclass(eq=False)
class Block:
    """A piece of a segment, which knows its neighbours there.

    Attributes:
        size: Its bytes.
        address: Where it begins; all segments lie one after the other.
        small: Whether its segment is one of small blocks.
        arena: The name of its arena.
        free: Whether nobody has it.
        before: The block before it in the segment.
        after: The block after it.
    """

    size: int
    address: int
    small: bool
    arena: str
    free: bool = False
    before: "Block | None" = None
    after: "Block | None" = None


@dataclass
class _Arena:
    """The free blocks of one arena, by address: those of small segments, and the others."""

    small: dict[int, Block] = field(default_factory=dict)
    large: dict[int, Block] = field(default_factory=dict)

    def of(self, small: bool) -> dict[int, Block]:
        return self.small if small else self.large


class Pool:
    """What the allocator has asked the driver for, and what it has given away.

    Attributes:
        reserved: The bytes of all segments.
        peak_reserved: The most that `reserved` was.
        allocated: The bytes of all blocks that somebody has.
    """

    def __init__(self) -> None:
        self.reserved = self.peak_reserved = self.allocated = 0
        self._arenas: dict[str, _Arena] = {}
        self._end = 0  # of the last segment

    def take(self, size: int, arena: str = "") -> Block:
        """Return a block of at least `size` bytes, size > 0, from the segments of an arena."""
        size = rounded(size)
        small = size <= SMALL
        free = self._arenas.setdefault(arena, _Arena()).of(small)
        fitting = [block for block in free.values() if block.size >= size]
        if fitting:
            block = min(fitting, key=lambda block: (block.size, block.address))
            del free[block.address]
            block.free = False
        else:
            block = self._segment(size, small, arena)
        left = block.size - size
        if left >= GRANULE if small else left > SMALL:
            self._cut(block, size, free)
        self.allocated += block.size
        return block

    def give(self, block: Block) -> None:
        """Take a block back."""
        self.allocated -= block.size
        block.free = True
        free = self._arenas[block.arena].of(block.small)
        if block.after is not None and block.after.free:
            del free[block.after.address]
            _join(block, block.after)
        if block.before is not None and block.before.free:
            before = block.before
            del free[before.address]
            _join(before, block)
            block = before
        free[block.address] = block

    def empty(self, wanted: Callable[[str], bool] = lambda arena: True) -> None:
        """Return to the driver the segments, of the arenas that are `wanted`, that nobody uses."""
        for name, arena in self._arenas.items():
            for free in (arena.small, arena.large) if wanted(name) else ():
                whole = [b for b in free.values() if b.before is None and b.after is None]
                for block in whole:
                    del free[block.address]
                    self.reserved -= block.size

    def _segment(self, size: int, small: bool, arena: str) -> Block:
        """Ask the driver for a segment, and return it as one block."""
        own = -(-size // ROUND) * ROUND
        whole = SMALL_SEGMENT if small else MEDIUM_SEGMENT if size < MEDIUM else own
        block = Block(whole, self._end, small, arena)
        self._end += whole
        self.reserved += whole
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _cut(self, block: Block, size: int, free: dict[int, Block]) -> None:
        """Leave a block its first `size` bytes; the rest is free."""
        rest = Block(
            block.size - size,
            block.address + size,
            block.small,
            block.arena,
            True,
            block,
            block.after,
        )
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        free[rest.address] = rest


def _join(first: Block, second: Block) -> None:
    """Let a block have the memory of the one after it."""
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
