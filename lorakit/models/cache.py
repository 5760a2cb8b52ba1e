"""The interface between the decoder and a cache of keys and values.

Text is generated with the cache of inference/kv_cache.py. A learned prompt is a cache too
(adapters/methods/prompts.py). The blocks ask a cache for no more than `Storage`; the rest is for
who makes the views of a call.
"""

from collections.abc import Collection
from typing import Protocol

from torch import Tensor


class Storage(Protocol):
    """What the blocks ask a cache for."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, T, Hk, D] of new positions of a layer.

        Returns:
            Keys and values [B, S, Hk, D] of the positions that the new ones may look at.
        """


class SharedKeys:
    """A storage whose keys and values later layers of the same call see too.

    Gradients flow from these layers into the one that made them. A block that runs again for its
    backward (gradient checkpointing) finds what its first run found, and changes nothing here.
    """

    def __init__(self, storage: Storage | None, sources: Collection[int]):
        """Make room for one call.

        Args:
            storage: The storage that keeps keys and values beyond the call, if there is one.
            sources: The numbers of the layers whose keys and values others see.
        """
        self.storage, self.sources = storage, sources
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, T, Hk, D] as `Storage.append` does, and keep a source's."""
        seen = (k, v) if self.storage is None else self.storage.append(layer, k, v)
        if layer in self.sources:
            self._found.setdefault(layer, seen)
        return seen

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return what `append` returned for a layer, [B, S, Hk, D] each."""
        return self._found[layer]


class States(Protocol):
    """What layers of linear attention ask a cache for: a state of fixed size for each row.

    Shapes: B rows, T new positions, C channels of a convolution over K positions, nv heads of
    values of width dv, whose keys have the width dk.
    """

    def state(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the state of a layer after the positions that the cache holds.

        Returns:
            The last inputs of the convolution [B, K - 1, C], in the model's dtype, and the
            matrices S, fp32 [B, nv, dk, dv]; None where all rows begin.
        """

    def keep_state(self, layer: int, before: Tensor, inputs: Tensor, state: Tensor) -> None:
        """Take the state after the new positions.

        Args:
            layer: The number of the layer.
            before: The last inputs of the convolution before this call [B, K - 1, C].
            inputs: Those of the new positions [B, T, C].
            state: The matrices S after them, fp32 [B, nv, dk, dv].
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
