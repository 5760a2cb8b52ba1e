"""Keys and values of the positions that a model has seen, so that each is computed once.

They lie in pages of PAGE positions. What the cache holds of a row is a `Line`: its length, and the
numbers of its pages in order. So memory follows what rows hold, and rows with the same beginning
share pages without a copy:

    keys, values of a layer      [pages, PAGE, Hk, D]
    position p of a row          slot p % PAGE of page pages[p // PAGE]

A full page may get a name, the hash of its tokens and of all tokens before them. Whoever begins
with the same tokens takes it by that name (`adopt`), also while the row that computed it still
runs. A page is written to by one row only: the one whose last page it is. A page that nobody uses
keeps its content and its name until room is needed; the one that was left first goes first.

Layers with a sliding window look at the last positions alone, so they have pages of their own,
which a row leaves when they lie behind the window. Layers with one window are a kind; a line has a
list of pages for each kind. A layer that sees the keys and values of an earlier one has none of
its own.

Layers of linear attention keep no keys. Each line holds a state for each of them, of a fixed size,
which says what all its positions left behind. A state belongs to the end of a row alone, so that a
row with another end cannot go on with a page of the middle: in models with such layers, no page is
found by its name. A copy of the whole row (`copy`) has its states too.

The compiled step reads keys and values through these lists. The decoder's modules want one tensor,
so that for them a call gathers the pages of its rows: a copy, which costs less than the rest of
such a call.
"""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.inference.pages import Pool
from lorakit.models.config import ModelConfig
from lorakit.models.rope import query_scale
from lorakit.models.views import AttentionView, tables_of

PAGE = 64
"""Positions of a page, a power of two."""
PART = 256
"""Most new positions of a row that one call takes, unless the row is empty."""


class _State(NamedTuple):
    """The state of a row in a layer of linear attention, among those of rows computed with it."""

    inputs: Tensor
    """The last inputs of the convolution [n, K - 1, C]."""
    S: Tensor
    """The matrices, fp32 [n, nv, dk, dv]."""
    row: int
    """Which of the n rows it is."""


class Line:
    """What the cache holds of one row."""

    def __init__(self, kinds: int, root: bytes):
        self.root, self.length = root, 0
        self.pages = tuple(array("q") for _ in range(kinds))  # -1: behind the window
        self.states: dict[int, _State] = {}  # of layers of linear attention
        self.named = 0  # how many of its first pages can be found by name
        self._names: list[bytes] = []

    def names(self, tokens: Sequence[int], count: int) -> list[bytes]:
        """Return the names of the first `count` pages, or more, of a row of these tokens."""
        while len(self._names) < count:
            n = len(self._names)
            before = self._names[-1] if n else self.root
            content = array("q", tokens[n * PAGE : (n + 1) * PAGE]).tobytes()
            self._names.append(sha256(before + content).digest())
        return self._names


class KVCache:
    """The pages of all layers, and who uses them."""

    def __init__(
        self,
        config: ModelConfig,
        tokens: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Make room.

        Args:
            config: The model's.
            tokens: How many positions the rows hold together, rounded up to pages.
            rows: How many rows layers with a window have room for; they need no more of each row
                than the window.
            dtype: Of keys and values.
            device: Where they lie.
        """
        layers = range(config.num_hidden_layers)
        self.windows = {i: config.window(i) for i in layers if not config.is_linear(i)}
        self.reach = list(dict.fromkeys(self.windows.values()))  # the window of each kind
        self.kind_of = {i: self.reach.index(window) for i, window in self.windows.items()}
        self.shares = len(self.windows) == len(layers)
        pages = -(-tokens // PAGE)
        self.tokens = pages * PAGE
        self.pools = [Pool(min(pages, rows * self._span(w)) if w else pages) for w in self.reach]
        owners = {i: kind for i, kind in self.kind_of.items() if config.kv_source(i) is None}
        firsts = [
            next(i for i, each in owners.items() if each == kind) for kind in range(len(self.pools))
        ]
        shapes = [(config.layer_kv_heads(i), config.layer_head_dim(i)) for i in firsts]
        # Memory that is not touched yet costs nothing on most systems; `grow` fills pages with 0.
        self.stores = [
            torch.empty(
                (list(owners.values()).count(kind), 2, pool.count, PAGE, *shapes[kind]),
                dtype=dtype,
                device=device,
            )
            for kind, pool in enumerate(self.pools)
        ]
        unused = [iter(store) for store in self.stores]
        pairs = {i: next(unused[kind]) for i, kind in owners.items()}
        self.keys = {i: pair[0] for i, pair in pairs.items()}
        self.values = {i: pair[1] for i, pair in pairs.items()}

    @staticmethod
    def _span(window: int) -> int:
        """Return how many pages a row needs at most in a layer with a window."""
        return (window + PART - 3) // PAGE + 2

    def behind(self, kind: int, position: int) -> int:
        """Return how many of a row's first pages lie behind the window of a position."""
        window = self.reach[kind]
        return 0 if window is None else max(0, position + 1 - window) // PAGE

    def line(self, root: bytes = b"") -> Line:
        """Return a new line; lines whose roots differ share nothing."""
        return Line(len(self.pools), root)

    def _missing(self, line: Line, n: int) -> list[int]:
        """Return how many pages of each kind n more positions of a line need at most."""
        pages = -(-(line.length + n) // PAGE)
        missing = [pages - len(held) for held in line.pages]
        return [
            max(0, m if window is None else min(m, self._span(window)))
            for m, window in zip(missing, self.reach, strict=True)
        ]

    def fits(self, n: int) -> bool:
        """Return whether the cache could hold a row of n positions, if it were alone."""
        missing = self._missing(self.line(), n)
        return all(m <= pool.count for m, pool in zip(missing, self.pools, strict=True))

    def has_room(self, wanted: Iterable[tuple[Line, int]]) -> bool:
        """Return whether there is room for n more positions of each of these lines now."""
        missing = [self._missing(line, n) for line, n in wanted]
        sums = [sum(each) for each in zip(*missing, strict=True)]
        return all(m <= pool.room for m, pool in zip(sums, self.pools, strict=True))

    @property
    def load(self) -> float:
        """The share of the pages that rows use."""
        return max(1 - pool.room / pool.count for pool in self.pools)

    def grow(self, line: Line, n: int) -> bool:
        """Give a line pages for n more positions, and leave those behind its windows.

        More than PART positions come to an empty line. What lies behind a window after them gets no
        page.

        Returns:
            False if pages are lacking. The line has got none then.
        """
        end, missing = line.length + n, []
        if len(line.pages[0]) * PAGE >= end:
            return True
        for kind, (pool, pages) in enumerate(zip(self.pools, line.pages, strict=True)):
            for number in range(min(len(pages), self.behind(kind, line.length)) - 1, -1, -1):
                if pages[number] < 0:
                    break
                pool.leave(pages[number])
                pages[number] = -1
            skipped = self.behind(kind, end) if n > PART else 0
            missing.append((skipped, -(-end // PAGE) - max(len(pages), skipped)))
        if any(n > pool.room for (_, n), pool in zip(missing, self.pools, strict=True)):
            return False
        for pool, store, pages, (skipped, n) in zip(
            self.pools, self.stores, line.pages, missing, strict=True
        ):
            pages.extend([-1] * (skipped - len(pages)))
            for _ in range(n):
                pages.append(pool.take())
                # a masked product with what the page held before could be NaN
                store[:, :, pages[-1]].zero_()
        return True

    def name(self, line: Line, tokens: Sequence[int], unit: int) -> None:
        """Let others find the full pages of a line, which holds the first of these tokens.

        Pages get their names in groups of `unit` positions, a multiple of PAGE.
        """
        count = min(line.length, len(tokens)) // unit * (unit // PAGE)
        if count <= line.named or not self.shares:
            return
        names = line.names(tokens, count)
        for pool, pages in zip(self.pools, line.pages, strict=True):
            for n in range(line.named, count):
                if pages[n] >= 0:
                    pool.name(pages[n], names[n])
        line.named = count

    def adopt(self, line: Line, tokens: Sequence[int], unit: int) -> int:
        """Let a line go on with pages that hold what follows in it, as far as there are any.

        Args:
            line: The line; it holds the first of the tokens.
            tokens: The row's tokens, as far as it may take them over. It goes on with these.
            unit: As in `name`; a line that ends between two groups takes nothing.

        Returns:
            How many positions it has gained.
        """
        start, step, most = line.length // PAGE, unit // PAGE, len(tokens) // unit * (unit // PAGE)
        if line.length % unit or most <= start or not self.shares:
            return 0
        names = line.names(tokens, most)
        whole = [pool for pool, w in zip(self.pools, self.reach, strict=True) if w is None]
        run = start
        while run < most and all(names[run] in pool.page_of for pool in whole):
            run += 1
        for n in range(run - (run - start) % step, start, -step):
            firsts = [max(start, self.behind(k, n * PAGE)) for k in range(len(self.pools))]
            pairs = list(zip(self.pools, firsts, strict=True))
            if all(name in pool.page_of for pool, first in pairs for name in names[first:n]):
                for pages, (pool, first) in zip(line.pages, pairs, strict=True):
                    pages.extend([-1] * (first - len(pages)))
                    pages.extend(pool.share(name) for name in names[first:n])
                line.length, line.named = n * PAGE, n
                return (n - start) * PAGE
        return 0

    def copy(self, line: Line, source: Line) -> bool:
        """Let a line go on from where another one has come to.

        They share full pages. Of a page that is not full the line gets a copy.

        Returns:
            False if pages are lacking; the line is as it was then.
        """
        part = bool(source.length % PAGE)
        if part and any(not pool.room for pool in self.pools):
            return False
        self.release(line)
        line.root, line.length, line.named = source.root, source.length, source.named
        line.states |= source.states
        for pool, store, pages, held in zip(
            self.pools, self.stores, line.pages, source.pages, strict=True
        ):
            full = source.length // PAGE
            for page in held[:full]:
                pool.users[page] += page >= 0
                pages.append(page)
            if part:
                pages.append(pool.take())
                store[:, :, pages[-1]] = store[:, :, held[full]]
        return True

    def release(self, line: Line, forget: bool = False) -> None:
        """Empty a line; `forget` says that nobody may find its pages any more."""
        for pool, pages in zip(self.pools, line.pages, strict=True):
            for page in reversed(pages):  # the beginning of a row is found longest
                if page >= 0:
                    if forget:
                        pool.forget(page)
                    pool.leave(page)
            del pages[:]
        line.length = line.named = 0
        line.states.clear()


class NewPositions:
    """What one call adds to a cache: `new[b]` positions to `lines[b]`, which have the pages.

    The blocks append to it as to a cache, T positions a row: those beyond `new[b]` are not kept.
    """

    def __init__(self, cache: KVCache, lines: Sequence[Line], new: Sequence[int]):
        self.cache, self.lines = cache, list(lines)
        self.starts = [line.length for line in lines]
        self.ends = [start + n for start, n in zip(self.starts, new, strict=True)]
        self.fresh = not any(self.starts)
        self.length = 0  # of a learned prompt's cache: it is yet to come
        self.device = cache.stores[0].device
        self.new = list(new)
        self.states: dict[int, tuple[Tensor, Tensor]] = {}  # after the new positions
        self.bounds = torch.tensor([self.starts, self.ends], device=self.device)
        self.places = [self._places(kind) for kind in range(len(cache.reach))]

    def _places(self, kind: int) -> tuple[int, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return what a call reads and writes in the layers of a kind.

        Returns:
            How many slots it looks at; the first page that each row looks at [n]; these and the
            further pages [n, P]; and of the positions that are kept, their rows, their numbers in
            the call, and their slots.
        """
        firsts = [self.cache.behind(kind, start) for start in self.starts]
        parts = [
            line.pages[kind][first : (end - 1) // PAGE + 1].tolist()
            for line, first, end in zip(self.lines, firsts, self.ends, strict=True)
        ]
        wide = max(map(len, parts))
        table = torch.tensor([part + [-1] * (wide - len(part)) for part in parts])
        first, (starts, ends) = torch.tensor(firsts)[:, None], self.bounds.cpu()[:, :, None]
        positions = starts + torch.arange(int((ends - starts).max()))
        pages = table.gather(1, (positions // PAGE - first).clamp(max=wide - 1))
        rows, numbers = ((positions < ends) & (pages >= 0)).nonzero(as_tuple=True)
        slots = (pages * PAGE + positions % PAGE)[rows, numbers]
        used = max(end - first * PAGE for end, first in zip(self.ends, firsts, strict=True))
        found = [t.to(self.device) for t in (first, table.clamp(min=0), rows, numbers, slots)]
        return used, found[0], found[1], (found[2], found[3], found[4])

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [n, T, Hk, D] of a layer.

        Returns:
            Keys and values [n, S, Hk, D]: the call's own where all rows begin, else the lines'.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        used, _, table, (rows, numbers, slots) = self.places[self.cache.kind_of[layer]]
        keys.flatten(0, 1)[slots] = k[rows, numbers]
        values.flatten(0, 1)[slots] = v[rows, numbers]
        if self.fresh:
            return k, v
        return keys[table].flatten(1, 2)[:, :used], values[table].flatten(1, 2)[:, :used]

    def state(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the state of a layer of linear attention, or None where all rows begin.

        Returns:
            The last inputs of the convolution [n, K - 1, C], and S, fp32 [n, nv, dk, dv].
        """
        if self.fresh:
            return None
        found = [line.states.get(layer) for line in self.lines]
        known = next(each for each in found if each is not None)
        rows = [each.row for each in found if each is not None and each.S is known.S]
        if len(rows) == len(found) and rows == list(range(len(known.S))):
            return known.inputs, known.S  # the rows of the last call, none of which left
        beginning = _State(torch.zeros_like(known.inputs[:1]), torch.zeros_like(known.S[:1]), 0)
        parts = [beginning if each is None else each for each in found]
        return (
            torch.cat([each.inputs[each.row : each.row + 1] for each in parts]),
            torch.cat([each.S[each.row : each.row + 1] for each in parts]),
        )

    def keep_state(self, layer: int, before: Tensor, inputs: Tensor, state: Tensor) -> None:
        """Take the state of a layer after the new positions; see `States`."""
        width = before.shape[1]
        starts, ends = self.bounds
        # in the inputs, those of before first, the ones that come before position n of the new ones
        places = (ends - starts)[:, None] + torch.arange(width, device=before.device)
        if min(self.new) < width:
            inputs = torch.cat([before, inputs], dim=1)
        else:
            places -= width
        last = inputs.gather(1, places[..., None].expand(-1, -1, inputs.shape[2]))
        self.states[layer] = last, state

    def commit(self) -> None:
        """Count the new positions, once every layer has stored them."""
        for b, (line, end) in enumerate(zip(self.lines, self.ends, strict=True)):
            line.length = end
            line.states.update({i: _State(*found, b) for i, found in self.states.items()})

    def views(self, config: ModelConfig, T: int) -> list[AttentionView]:
        """Return, for each layer, what T positions a row see."""
        starts, ends = self.bounds
        positions = starts[:, None] + torch.arange(T, device=starts.device)
        positions = torch.minimum(positions, ends[:, None] - 1)
        tables = tables_of(config, positions)
        scale = query_scale(config.rope, positions, max(self.ends))
        reach = self.cache.reach
        views: dict[tuple[int, int], AttentionView] = {}
        masks = [
            None if self.fresh else self._mask(kind, positions, window)
            for kind, window in enumerate(reach)
        ]
        kinds = {i: (kind, config.rope_number(i)) for i, kind in self.cache.kind_of.items()}
        for kind, rope in set(kinds.values()):
            views[kind, rope] = AttentionView(
                tables[rope], masks[kind], reach[kind], None, False, False, scale
            )
        real = None
        if any(config.linear_layers) and min(self.new) < T:
            real = torch.arange(T, device=ends.device) < (ends - starts)[:, None]
        linear = AttentionView(tables[0], None, None, None, False, False, None, real)
        layers = range(config.num_hidden_layers)
        return [views[kinds[i]] if i in kinds else linear for i in layers]

    def _mask(self, kind: int, positions: Tensor, window: int | None) -> Tensor:
        """Return which slots the queries at `positions` [n, T] look at: bool [n, 1, T, S]."""
        used, first, _, _ = self.places[kind]
        held = first * PAGE + torch.arange(used, device=first.device)  # [n, S]
        held, queries = held[:, None], positions[:, :, None]
        mask = held <= queries
        if window is not None:
            mask &= held > queries - window
        return mask[:, None]
