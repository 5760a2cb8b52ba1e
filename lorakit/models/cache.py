"""The interface between the decoder and a cache of keys and values.

Text is generated with the cache of inference/kv_cache.py. A learned prompt is a cache too
(adapters/methods/prompts.py). The blocks ask a cache for no more than `Storage`; the rest is for
who makes the views of a call.
"""

from typing import Protocol

from torch import Tensor


class Storage(Protocol):
    """What the blocks ask a cache for."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, T, Hk, D] of new positions of a layer.

        Returns:
            Keys and values [B, S, Hk, D] of the positions that the new ones may look at.
        """


class Cache(Storage, Protocol):
    """Keys and values of earlier positions, for each layer.

    Shapes: B rows, T new positions, S positions with those in the cache, Hk heads of keys and
    values, D numbers a head.
    """

    length: int
    """Number of positions that every layer holds."""

    def positions(self, new: int, window: int | None) -> Tensor:
        """Return which positions `append` will return for `new` ones: int64 [S].

        Layers of one window get the same positions. A single new position may look at all of them.
        Several new ones may not: the caller masks what lies beyond the window of each.
        """
