"""State that is larger than the memory for it: pages, of which only some are resident.

One flat space of bytes is cut into pages of a fixed size. A `PageTable` knows which pages are
resident, and keeps them under a budget: the page that was not used for longest has to go, after its
changes were written back. A store says where the pages lie, and what resident means:

    store        the pages lie in         a resident page is            fetched and written by
    FileStore    a file, memory-mapped    the mapping's own memory      the system
    PinnedStore  pinned host memory       a buffer on the device        copies on two side streams

The cost: a step over n pages with a budget of k moves n - k of them in and as many out, if it walks
back and forth (`walk`). In one direction only, the least recently used page would be the very next
one, and no page would ever be found resident. On a device the copies in, the copies out and the
arithmetic overlap, from a budget of three pages on: a page is written back one eviction before its
buffer is needed.

The file has no name. The system removes it when the store is gone, however the process ends. The
disk gives the room for it when it grows, so that a full disk is an error then, and not a signal in
the middle of a step.
"""

import math
import mmap
import os
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError

PAGE_BYTES = 8 << 20  # a copy takes 0.3 ms over PCIe 4, as long as some fifty launches of a kernel
MADV_POPULATE_WRITE = 23  # from Linux 5.14 on; Python has no name for it


class Store(Protocol):
    """A place of pages. A page is loaded, waited for, used, perhaps written back, and dropped."""

    page_bytes: int

    def grow(self, pages: int) -> None:
        """Have `pages` pages; new ones hold zeros. Raises LorakitError if there is no room."""

    def load(self, page: int) -> Tensor:
        """Begin to make a page resident. Return its memory, uint8 [page_bytes]."""

    def wait(self, page: int) -> None:
        """Let all work on its memory that is asked for from now on see the page."""

    def used(self, page: int) -> None:
        """Let all work on its memory that was asked for so far come before its write-back."""

    def write_back(self, page: int) -> None:
        """Begin to keep what changed in its memory."""

    def drop(self, page: int) -> None:
        """Give its memory to other pages."""

    def read(self, page: int, into: Tensor) -> None:
        """Copy a page, as it was last written back, into uint8 [page_bytes] in host memory."""


class PageTable:
    """Which pages of `store` are resident: at most as many as `budget` bytes hold.

    Raises LorakitError if the budget is below one page.
    """

    def __init__(self, store: Store, budget: int):
        check_budget(budget, store.page_bytes)
        self.store = store
        self.capacity = budget // store.page_bytes
        self.pages = 0
        self._resident: OrderedDict[int, Tensor] = OrderedDict()  # least recently used first
        self._in_use: set[int] = set()
        self._dirty: set[int] = set()
        self._forth = True

    def grow(self, nbytes: int) -> None:
        """Have pages for the first `nbytes` of the space.

        Raises LorakitError if there is no room, and then nothing has changed.
        """
        pages = -(-nbytes // self.store.page_bytes)
        if pages > self.pages:
            self.store.grow(pages)
            self.pages = pages

    @contextmanager
    def use(self, page: int) -> Iterator[Tensor]:
        """Yield the memory of a page, uint8 [page_bytes].

        Within the block it stays resident, and may be changed.
        """
        memory = self._bring(page)
        if memory is None:
            raise LorakitError(f"all {self.capacity} pages of the budget are in use")
        self._in_use.add(page)
        try:
            self.store.wait(page)
            yield memory
        finally:
            self.store.used(page)
            self._dirty.add(page)
            self._in_use.remove(page)

    def prefetch(self, page: int) -> None:
        """Begin to make a page resident, unless all pages of the budget are in use."""
        self._bring(page)

    def walk(self, pages: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield each page and its memory, in ascending order, the next time in descending order.

        A page is in use until the next one is asked for, which is fetched meanwhile.
        """
        order = sorted(pages, reverse=not self._forth)
        self._forth = not self._forth
        for i, page in enumerate(order):
            with self.use(page) as memory:
                if i + 1 < len(order):
                    self.prefetch(order[i + 1])
                yield page, memory

    def read(self, page: int, into: Tensor) -> None:
        """Copy a page into uint8 [page_bytes] in host memory, without making it resident."""
        self._clean(page)
        self.store.read(page, into)

    def _bring(self, page: int) -> Tensor | None:
        """Make a page resident. Return its memory, or None if all pages are in use."""
        if page in self._resident:
            self._resident.move_to_end(page)
            return self._resident[page]
        if len(self._resident) == self.capacity:
            victims = [each for each in self._resident if each not in self._in_use][:2]
            if not victims:
                return None
            for victim in victims:  # the second one goes next, and will be written by then
                self._clean(victim)
            self.store.drop(victims[0])
            del self._resident[victims[0]]
        self._resident[page] = self.store.load(page)
        return self._resident[page]

    def _clean(self, page: int) -> None:
        if page in self._dirty:
            self.store.write_back(page)
            self._dirty.remove(page)


def check_budget(budget: int, page_bytes: int) -> None:
    """Raise LorakitError if a budget is below one page."""
    if budget < page_bytes:
        raise LorakitError(
            f"page_budget is {budget} bytes; it must hold at least one page of {page_bytes}"
        )


class FileStore:
    """Pages in a memory-mapped file of `directory`; the file has no name.

    Pages in the process's own page tables are resident. The system writes and reads them, and may
    keep them in memory that it has left over. On macOS it also decides when a dropped page leaves.
    In a directory that lies in memory itself (tmpfs, on some systems /tmp) no memory is saved.

    Raises LorakitError if no file can be made in the directory.
    """

    def __init__(self, directory: str | Path | None = None, page_bytes: int = PAGE_BYTES):
        self.page_bytes = page_bytes
        self.file = scratch_file(directory)
        self._memory: list[tuple[mmap.mmap, int]] = []  # a mapping for each page, and where in it

    def grow(self, pages: int) -> None:
        start, count = len(self._memory), pages - len(self._memory)
        region = mapped(self.file, start * self.page_bytes, count * self.page_bytes)
        self._memory += [(region, i * self.page_bytes) for i in range(count)]

    def load(self, page: int) -> Tensor:
        region, start = self._memory[page]
        region.madvise(mmap.MADV_WILLNEED, start, self.page_bytes)  # from the disk, if it was there
        return torch.frombuffer(region, dtype=torch.uint8, count=self.page_bytes, offset=start)

    def wait(self, page: int) -> None:
        region, start = self._memory[page]
        if sys.platform == "linux":
            with suppress(OSError):  # an older kernel then fetches 4 KB at a time, when touched
                region.madvise(MADV_POPULATE_WRITE, start, self.page_bytes)

    def used(self, page: int) -> None:
        """There is nothing to wait for."""

    def write_back(self, page: int) -> None:
        """There is nothing to write: the mapping is the file."""

    def drop(self, page: int) -> None:
        region, start = self._memory[page]
        region.madvise(mmap.MADV_DONTNEED, start, self.page_bytes)

    def read(self, page: int, into: Tensor) -> None:
        self.file.seek(page * self.page_bytes)
        self.file.readinto(into.numpy().data)


class _Slot:
    """A buffer on the device, and the event after which no work on it is left."""

    def __init__(self, memory: Tensor, done: torch.cuda.Event):
        self.memory = memory
        self.done = done


class PinnedStore:
    """Pages in pinned host memory. Resident pages are in buffers on `device`, a CUDA GPU.

    Copies in run on one stream and copies out on another, beside what the caller's stream computes.
    The host never waits, except in `read`.
    """

    def __init__(self, device: torch.device, page_bytes: int = PAGE_BYTES):
        self.page_bytes = page_bytes
        self.device = device
        self._host: list[Tensor] = []
        self._slots: dict[int, _Slot] = {}
        self._free: list[_Slot] = []
        self._written: dict[int, torch.cuda.Event] = {}  # when the host has a page's changes
        self._in, self._out = (torch.cuda.Stream(device) for _ in range(2))

    def grow(self, pages: int) -> None:
        count, pinned = pages - len(self._host), self.device.type == "cuda"
        try:
            fresh = [
                torch.zeros(self.page_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
                for _ in range(count)
            ]
        except RuntimeError as error:
            raise LorakitError(
                f"paged state: the system gives no {count * self.page_bytes / 1e6:.0f} MB of "
                f"pinned host memory; give it more, or use 8-bit state"
            ) from error
        self._host += fresh

    def load(self, page: int) -> Tensor:
        slot = self._free.pop() if self._free else self._new_slot()
        self._slots[page] = slot
        # The page's own last write-back is over too: the load that took its buffer then waited for
        # it, and comes before this load in the stream.
        self._in.wait_event(slot.done)
        with torch.cuda.stream(self._in):
            slot.memory.copy_(self._host[page], non_blocking=True)
        slot.done = self._in.record_event()
        return slot.memory

    def wait(self, page: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._slots[page].done)

    def used(self, page: int) -> None:
        self._slots[page].done = torch.cuda.current_stream(self.device).record_event()

    def write_back(self, page: int) -> None:
        slot = self._slots[page]
        self._out.wait_event(slot.done)
        with torch.cuda.stream(self._out):
            self._host[page].copy_(slot.memory, non_blocking=True)
        slot.done = self._written[page] = self._out.record_event()

    def drop(self, page: int) -> None:
        self._free.append(self._slots.pop(page))

    def read(self, page: int, into: Tensor) -> None:
        if page in self._written:
            self._written[page].synchronize()
        into.copy_(self._host[page])

    def _new_slot(self) -> _Slot:
        """Return a new buffer, which all streams are told of.

        Its memory may have been that of a tensor that the caller's stream still works on. When it
        is given back, the side streams may still work on it.
        """
        memory = torch.empty(self.page_bytes, dtype=torch.uint8, device=self.device)
        for stream in (self._in, self._out):
            memory.record_stream(stream)
        return _Slot(memory, torch.cuda.current_stream(self.device).record_event())


class PretendedStore:
    """Pages of a device that is pretended (kernels/pretend.py): a resident one has its size."""

    def __init__(self, device: torch.device, page_bytes: int = PAGE_BYTES):
        self.page_bytes, self.device = page_bytes, device
        self._resident: dict[int, Tensor] = {}
        self._free: list[Tensor] = []

    def grow(self, pages: int) -> None:
        """Nothing is kept."""

    def load(self, page: int) -> Tensor:
        memory = self._free.pop() if self._free else self._new()
        self._resident[page] = memory
        return memory

    def wait(self, page: int) -> None:
        """There is nothing to wait for."""

    def used(self, page: int) -> None:
        """There is nothing to wait for."""

    def write_back(self, page: int) -> None:
        """There are no values."""

    def drop(self, page: int) -> None:
        self._free.append(self._resident.pop(page))

    def read(self, page: int, into: Tensor) -> None:
        raise LorakitError("a device that is pretended holds no values")

    def _new(self) -> Tensor:
        return torch.empty(self.page_bytes, dtype=torch.uint8, device=self.device)


def scratch_file(directory: str | Path | None) -> FileIO:
    """Return a new file without a name in `directory`, or in the system's for temporary files.

    Raises LorakitError if none can be made.
    """
    try:
        return tempfile.TemporaryFile(dir=directory, buffering=0)
    except OSError as error:
        where = directory or tempfile.gettempdir()
        raise LorakitError(
            f"no page file can be made in {where} ({error.strerror}); name another page_dir, "
            "which in a run is output_dir"
        ) from error


def mapped(file: FileIO, start: int, nbytes: int) -> mmap.mmap:
    """Make a file longer by `nbytes` after `start`, and return those bytes memory-mapped.

    The disk gives their room at once. Raises LorakitError if it has none, and leaves the file as
    long as it was.
    """
    try:
        _take_room(file.fileno(), start, nbytes)
        return mmap.mmap(file.fileno(), nbytes, offset=start)
    except OSError as error:
        os.ftruncate(file.fileno(), start)
        raise LorakitError(
            "paged state: the disk of the page file has no room for "
            f"{math.ceil(nbytes / 1e6)} MB more ({error.strerror}); name another page_dir, "
            "which in a run is output_dir, or use 8-bit state"
        ) from error


def _take_room(descriptor: int, start: int, nbytes: int) -> None:
    if sys.platform == "linux":
        os.posix_fallocate(descriptor, start, nbytes)
        return
    zeros = bytes(1 << 20)
    for at in range(start, start + nbytes, len(zeros)):
        os.pwrite(descriptor, zeros[: start + nbytes - at], at)
