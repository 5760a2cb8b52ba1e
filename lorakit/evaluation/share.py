"""What one of several processes computes of a list, and how all of them get the whole result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The items rank, rank + size, rank + 2 size, ... of any list.

    `collect` takes the results of these items, and returns those of all items in the list's order.
    All processes call it, with numbers or strings.
    """

    rank: int = 0
    size: int = 1
    collect: Callable[[list[Any]], list[Any]] = list

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items of this process."""
        return items[self.rank :: self.size]

    def rounds(self, items: Sequence[T]) -> list[T | None]:
        """Return the item of this process in each round of one item a process.

        In the last round some processes may have none, which is None.
        """
        places = range(self.rank, len(items) + self.rank, self.size)
        return [items[i] if i < len(items) else None for i in places]


ALL = Share()
"""The share of a process that computes everything itself."""
