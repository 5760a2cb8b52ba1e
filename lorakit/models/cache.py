"""What the decoder asks of a cache of keys and values.

`inference/kv_cache.py` is the one that text is generated with; a learned prompt is another
(adapters/methods/prompts.py).
"""

from typing import Protocol

from torch import Tensor


class Cache(Protocol):
    """Keys and values of earlier positions, for each layer.

    B rows, T new positions, Hk heads of keys and values, D numbers a head.
    """

    length: int
    """Number of positions that every layer holds."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, T, Hk, D] of new positions of a layer.

        Returns:
            Keys and values [B, S, Hk, D] of the positions that the new ones may look at.
        """

    def positions(self, new: int, window: int | None) -> Tensor:
        """Return which positions `append` will return for `new` ones: int64 [S].

        They differ between layers only by the sliding window. A single new position may look at all
        of them; for several the window has to be masked.
        """
