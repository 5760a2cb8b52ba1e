"""Keys and values of the positions that a model has seen, so that each is computed once.

A line of the cache holds one row. Rows begin and end at different times, so no two need be equally
long, and there is no padding: position p of a row lies in slot p of its line, and in a layer with a
sliding window in slot p modulo the number of slots,

    keys, values of a layer      [lines, size, Hk, D]
    size                         capacity, or with a window  min(capacity, window + PART - 1)

which holds what each of PART new positions may look at. The price of the modulo: of a row that
grew on, such a layer has forgotten what an earlier position would see. So a prefix of it can be
shared only near its end (`holds`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.models.config import ModelConfig
from lorakit.models.rope import rope_tables
from lorakit.models.views import AttentionView

PART = 256
"""Most new positions of a row that one call takes, unless the row is empty."""


class KVCache:
    """Keys and values of the rows; `lengths` says how many positions each line holds."""

    def __init__(
        self,
        config: ModelConfig,
        lines: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.capacity = capacity
        self.windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        self.sizes = [min(capacity, w + PART - 1) if w else capacity for w in self.windows]
        heads, width = config.num_key_value_heads, config.head_dim
        shapes = [(lines, size, heads, width) for size in self.sizes]
        # not empty: a masked product with what memory happens to hold could be NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.lengths = [0] * lines

    def holds(self, line: int, n: int) -> bool:
        """Return whether a line holds all that position n of its row looks at, and those after."""
        length = self.lengths[line]
        kinds = set(zip(self.sizes, self.windows, strict=True))
        return n <= length and all(
            window is None or length <= size or n + 1 - window >= length - size
            for size, window in kinds
        )

    def copy(self, source: int, target: int, n: int) -> None:
        """Let line `target` hold the first n positions of line `source`, which it `holds`."""
        if source != target:
            length = self.lengths[source]
            for tensor, size in zip(self.keys + self.values, 2 * self.sizes, strict=True):
                used = n if length <= size else size
                tensor[target, :used] = tensor[source, :used]
        self.lengths[target] = n

    def clear(self, line: int) -> None:
        """Forget a line, and what may be NaN in it."""
        for tensor in self.keys + self.values:
            tensor[line] = 0
        self.lengths[line] = 0


class NewPositions:
    """What one call adds to a cache: `new[b]` positions to line `lines[b]`.

    The blocks append to it as to a cache, T positions a row: those beyond `new[b]` are not kept.
    """

    def __init__(self, cache: KVCache, lines: Sequence[int], new: Sequence[int]):
        self.cache, self.lines, self.new = cache, list(lines), list(new)
        self.starts = [cache.lengths[line] for line in lines]
        self.ends = [start + n for start, n in zip(self.starts, new, strict=True)]
        self.fresh = not any(self.starts)
        device = cache.keys[0].device
        self.length = 0  # of a learned prompt's cache: it is yet to come
        self.index = torch.tensor([self.lines, self.starts, self.ends], device=device)
        first = self.lines[0]
        run = self.lines == list(range(first, first + len(self.lines)))
        self.rows = slice(first, first + len(self.lines)) if run else self.index[0]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [n, T, Hk, D] of a layer.

        Returns:
            Keys and values [n, S, Hk, D]: the call's own where all rows begin, else the lines'.
        """
        cache = self.cache
        size, keys, values = cache.sizes[layer], cache.keys[layer], cache.values[layer]
        if k.shape[1] == 1:
            at = self.index[0], self.index[1] % size
            keys[at], values[at] = k[:, 0], v[:, 0]
        else:
            for b, line in enumerate(self.lines):
                kept = min(self.new[b], size)
                slots = torch.arange(self.ends[b] - kept, self.ends[b], device=k.device) % size
                part = slice(self.new[b] - kept, self.new[b])
                keys[line, slots], values[line, slots] = k[b, part], v[b, part]
        if self.fresh:
            return k, v
        used = min(max(self.ends), size)
        return keys[self.rows, :used], values[self.rows, :used]

    def commit(self) -> None:
        """Count the new positions, once every layer has stored them."""
        for line, end in zip(self.lines, self.ends, strict=True):
            self.cache.lengths[line] = end

    def views(self, config: ModelConfig, T: int) -> list[AttentionView]:
        """Return, for each layer, what T positions a row see."""
        _, starts, ends = self.index
        positions = starts[:, None] + torch.arange(T, device=starts.device)
        positions = torch.minimum(positions, ends[:, None] - 1)
        tables = [rope_tables(rope, config.head_dim, positions) for rope in config.ropes]

        views = {}
        for layer, window in enumerate(self.cache.windows):
            slides = config.slides(layer)
            if slides not in views:
                local = slides and config.rope_local is not None
                size = self.cache.sizes[layer]
                mask = None if self.fresh else self._mask(positions, window, size)
                views[slides] = AttentionView(tables[local], mask, window, None, False, False)
        return [views[config.slides(layer)] for layer in range(config.num_hidden_layers)]

    def _mask(self, positions: Tensor, window: int | None, size: int) -> Tensor:
        """Return which slots the queries at `positions` [n, T] look at: bool [n, 1, T, S]."""
        used = min(max(self.ends), size)
        last = self.index[2][:, None] - 1
        held = last - (last - torch.arange(used, device=last.device)) % size  # [n, S]
        held, queries = held[:, None], positions[:, :, None]
        mask = (held >= 0) & (held <= queries)
        if window is not None:
            mask &= held > queries - window
        return mask[:, None]
