"""AdamW's state in pages (paging.py), for tensors of any size.

The state of a parameter is cut where a page ends, at a multiple of 256 values, the block of 8-bit
state. A piece holds both moments of its values, each on 64 bytes, so that one page is enough to
update them. Small parameters lie side by side in a page. A step of AdamW is the same arithmetic
for every value, or for every block, so a piece at a time gives the same bits as all at once.

    8-bit piece of n values    exp_avg uint8 [n] | its absmax fp32 [n / 256] | exp_avg_sq | absmax
    32-bit piece               exp_avg fp32 [n] | exp_avg_sq fp32 [n]

A piece of a bfloat16 parameter ends with its remainder, int16 [n].

Only the places of the pieces are kept beside the pages.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.kernels import pretend
from lorakit.kernels.ops.adamw.state import BLOCK
from lorakit.training.paging import (
    PAGE_BYTES,
    FileStore,
    PageTable,
    PinnedStore,
    PretendedStore,
    Store,
    check_budget,
    mapped,
    scratch_file,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
REMAINDER = "remainder"  # of bfloat16 parameters
ALIGNMENT = 64  # bytes; the kernels ask for 16


class Piece(NamedTuple):
    """Values start to stop of a parameter, and the place of their state in the device's pages."""

    start: int
    stop: int
    position: int

    def first(self, name: str) -> int:
        """Return where the piece begins in the whole tensor of the state that is called `name`."""
        return self.start // BLOCK if name.endswith("absmax") else self.start


def has_remainder(p: Tensor) -> bool:
    """Return whether the state of a parameter has what its dtype leaves out."""
    return p.dtype == torch.bfloat16


def layout(n: int, in_8bit: bool, halves: bool = False) -> dict[str, tuple[torch.dtype, int]]:
    """Return the dtype and the length of each tensor of the state of n values, in their order.

    `halves` says that the parameter has a remainder.
    """
    found = {}
    for name in MOMENTS:
        found[name] = (torch.uint8 if in_8bit else torch.float32, n)
        if in_8bit:
            found[f"{name}_absmax"] = (torch.float32, -(-n // BLOCK))
    if halves:
        found[REMAINDER] = (torch.int16, n)
    return found


def views(memory: Tensor, n: int, in_8bit: bool, halves: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a piece of n values. `memory`, uint8, begins with the piece."""
    found: dict[str, Tensor] = {}
    at = 0
    for name, (dtype, count) in layout(n, in_8bit, halves).items():
        nbytes = count * dtype.itemsize
        found[name] = memory[at : at + nbytes].view(dtype)
        at += _aligned(nbytes)
    return found


def cut(
    n: int, in_8bit: bool, position: int, page_bytes: int, halves: bool = False
) -> tuple[list[Piece], int]:
    """Return the pieces of n values, side by side from `position` on, and the end of the last."""
    pieces: list[Piece] = []
    start = 0
    while start < n:
        left = page_bytes - position % page_bytes
        count = n - start
        if _piece_bytes(count, in_8bit, halves) > left:
            of_block = layout(BLOCK, in_8bit, halves).values()
            count = left // sum(k * dtype.itemsize for dtype, k in of_block) * BLOCK
            while _piece_bytes(count, in_8bit, halves) > left:  # aligning the parts takes room too
                count -= BLOCK
        if count:
            nbytes = _piece_bytes(count, in_8bit, halves)
            pieces.append(Piece(start, start + count, position))
        position += nbytes if count else left
        start += count
    return pieces, position


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _piece_bytes(n: int, in_8bit: bool, halves: bool) -> int:
    tensors = layout(n, in_8bit, halves).values()
    return sum(_aligned(count * dtype.itemsize) for dtype, count in tensors)


class PagedState:
    """The states of parameters in pages, with a budget for each device.

    Raises LorakitError if the budget is below one page.
    """

    def __init__(self, budget: int, directory: str | Path | None, page_bytes: int = PAGE_BYTES):
        check_budget(budget, page_bytes)
        self.budget, self.directory, self.page_bytes = budget, directory, page_bytes
        self.clear()

    def clear(self) -> None:
        """Give all pages back."""
        self._tables: dict[torch.device, PageTable] = {}
        self._ends: dict[torch.device, int] = {}
        self._pieces: dict[Tensor, list[Piece]] = {}
        self._in_8bit: dict[Tensor, bool] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all pages, wherever they lie."""
        return sum(table.pages * self.page_bytes for table in self._tables.values())

    def __contains__(self, p: Tensor) -> bool:
        return p in self._pieces

    def add(self, params: Mapping[Tensor, bool]) -> None:
        """Give zero state to parameters that have none, of 8 bits if the value is True.

        Raises LorakitError if there is no room, or if a parameter is not contiguous, or on a device
        that is neither a CPU nor a CUDA device.
        """
        ends, pieces = dict(self._ends), dict[Tensor, list[Piece]]()
        for p, in_8bit in params.items():
            if not p.is_contiguous():
                raise LorakitError(
                    f"AdamW: a parameter of shape {tuple(p.shape)} is not contiguous; "
                    "paged state needs it to be"
                )
            end = ends.get(p.device, 0)
            halves = has_remainder(p)
            pieces[p], ends[p.device] = cut(p.numel(), in_8bit, end, self.page_bytes, halves)
        for device, end in ends.items():
            self._table(device).grow(end)
        self._ends = ends
        self._pieces |= pieces
        self._in_8bit |= params

    def walk(
        self, params: Iterable[Tensor]
    ) -> Iterator[list[tuple[Tensor, Piece, dict[str, Tensor]]]]:
        """Yield, page after page, the pieces of these parameters that lie there.

        Each comes as the parameter, the piece, and the tensors of its state, which may be changed
        until the next page is asked for.
        """
        for table, places in self._by_page(params):
            for page, memory in table.walk(places):
                yield [(p, piece, self._views(memory, p, piece)) for p, piece in places[page]]

    def snapshot(self) -> dict[Tensor, dict[str, Tensor]]:
        """Return a copy of the whole state, with the shapes of resident state, in host memory.

        The copy is memory-mapped from a file of its own in the directory. The file is gone with the
        last of the tensors.
        """
        total = sum(
            _piece_bytes(p.numel(), in_8bit, has_remainder(p))
            for p, in_8bit in self._in_8bit.items()
        )
        file = scratch_file(self.directory)
        region = mapped(file, 0, max(1, total))
        found: dict[Tensor, dict[str, Tensor]] = {}
        starts: dict[Tensor, dict[str, int]] = {}
        at = 0
        for p, in_8bit in self._in_8bit.items():
            found[p], starts[p] = {}, {}
            whole = (REMAINDER,) if in_8bit else (*MOMENTS, REMAINDER)  # of the parameter's shape
            for name, (dtype, count) in layout(p.numel(), in_8bit, has_remainder(p)).items():
                tensor = torch.empty(0, dtype=dtype, device="cpu")
                if count:
                    tensor = torch.frombuffer(region, dtype=dtype, count=count, offset=at)
                found[p][name] = tensor.view(p.shape) if name in whole else tensor
                starts[p][name] = at
                at += _aligned(count * dtype.itemsize)
        memory = torch.empty(self.page_bytes, dtype=torch.uint8, device="cpu")
        for table, places in self._by_page(self._pieces):
            for page in sorted(places):
                table.read(page, memory)
                for p, piece in places[page]:
                    for name, part in self._views(memory, p, piece).items():
                        start = starts[p][name] + piece.first(name) * part.itemsize
                        os.pwrite(file.fileno(), part.numpy().data, start)
        return found

    def fill(self, states: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Set the state of parameters that have one to whole states, as `snapshot` returns them."""
        for places in self.walk(states):
            for p, piece, parts in places:
                for name, part in parts.items():
                    first, whole = piece.first(name), states[p][name].reshape(-1)
                    part.copy_(whole[first : first + len(part)])

    def _by_page(
        self, params: Iterable[Tensor]
    ) -> Iterator[tuple[PageTable, dict[int, list[tuple[Tensor, Piece]]]]]:
        """Yield the table of one device after another, and what lies in each of its pages."""
        places: dict[torch.device, dict[int, list[tuple[Tensor, Piece]]]] = {}
        for p in params:
            pages = places.setdefault(p.device, {})
            for piece in self._pieces[p]:
                pages.setdefault(piece.position // self.page_bytes, []).append((p, piece))
        for device, pages in places.items():
            yield self._tables[device], pages

    def _views(self, memory: Tensor, p: Tensor, piece: Piece) -> dict[str, Tensor]:
        """Return the tensors of a piece in the memory of its page."""
        start = piece.position % self.page_bytes
        n = piece.stop - piece.start
        return views(memory[start:], n, self._in_8bit[p], has_remainder(p))

    def _table(self, device: torch.device) -> PageTable:
        if device not in self._tables:
            store: Store
            if device.type == "cuda":
                store = PinnedStore(device, self.page_bytes)
            elif device.type == "cpu":
                store = FileStore(self.directory, self.page_bytes)
            elif pretend.kind_of(device) in ("cpu", "cuda"):
                store = PretendedStore(device, self.page_bytes)
            else:
                raise LorakitError(f"AdamW: state of parameters on {device} cannot be paged")
            self._tables[device] = PageTable(store, self.budget)
        return self._tables[device]
