"""Carried out of lorakit/decoding.py."""

import torch
from torch import Tensor

from lorakit.models.config import ModelConfig


class KVCache:
    """Keys and values per layer, for `capacity` positions: [B, capacity, Hk, D], of which the first
    `length` are filled; a layer with a sliding window holds the window alone: [B, window, Hk, D],
    position p in slot p modulo window.

    `length` moves when the last layer has appended.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype, device):
        self.windows = [config.window(i) for i in range(config.num_hidden_layers)]
        heads = config.num_key_value_heads
        self.sizes = [min(capacity, window or capacity) for window in self.windows]
        shapes = [(batch, size, heads, config.head_dim) for size in self.sizes]
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.length = 0

    def slots(self, size: int, new: int) -> tuple[int, int]:
        """In a layer that holds `size` positions, where the first of `new` ones goes, and how many
        slots are in use with them.
        """
        return self.length % size, min(self.length + new, size)

    def positions(self, new: int, window: int | None) -> Tensor:
        """int64 [S]: the positions that `append` returns for `new` ones, in its order."""
        past, end, device = self.length, self.length + new, self.keys[0].device
        if window is None or end <= window:
            return torch.arange(end, device=device)
        if new > 1:
            return torch.arange(max(0, past - window + 1), end, device=device)
        slots = torch.arange(window, device=device)
        return past - (past - slots) % window  # the latest position that fell into each slot

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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
