"""Keys and values of the positions that a model has seen, so that each is computed once."""

import torch
from torch import Tensor

from lorakit.models.config import ModelConfig


class KVCache:
    """Keys and values of each layer, for a fixed number of positions.

        keys, values of a layer      [B, capacity, Hk, D], of which the first `length` are filled
        ... with a sliding window    [B, window, Hk, D], position p in slot p modulo window

    `length` moves when the last layer has appended.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        self.sizes = [min(capacity, window or capacity) for window in self.windows]
        heads = config.num_key_value_heads
        shapes = [(batch, size, heads, config.head_dim) for size in self.sizes]
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.length = 0

    def slots(self, size: int, new: int) -> tuple[int, int]:
        """Return where `new` positions go in a layer that holds `size` positions.

        Returns:
            The slot of the first new position, and how many slots are in use with the new ones.
        """
        return self.length % size, min(self.length + new, size)

    def positions(self, new: int, window: int | None) -> Tensor:
        """Return the positions that `append` returns for `new` ones, in its order: int64 [S]."""
        past, end, device = self.length, self.length + new, self.keys[0].device
        if window is None or end <= window:
            return torch.arange(end, device=device)
        if new > 1:
            return torch.arange(max(0, past - window + 1), end, device=device)
        slots = torch.arange(window, device=device)
        return past - (past - slots) % window  # the latest position that fell into each slot

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, T, Hk, D] of new positions of a layer.

        Returns:
            Keys and values [B, S, Hk, D] of the `positions` that the new ones may look at.
        """
        past, new = self.length, k.shape[1]
        window, keys, values = self.windows[layer], self.keys[layer], self.values[layer]
        if layer == len(self.keys) - 1:
            self.length = past + new
        end = past + new
        if window is None or end <= window:
            keys[:, past:end], values[:, past:end] = k, v
            return keys[:, :end], values[:, :end]
        if new == 1:
            keys[:, past % window], values[:, past % window] = k[:, 0], v[:, 0]
            return keys, values
        kept = torch.arange(max(0, past - window + 1), past, device=k.device) % window
        k, v = torch.cat([keys[:, kept], k], 1), torch.cat([values[:, kept], v], 1)
        last = torch.arange(end - window, end, device=k.device) % window
        keys[:, last], values[:, last] = k[:, -window:], v[:, -window:]
        return k, v
