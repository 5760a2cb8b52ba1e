"""The signs of life of ranks: who hangs or has ended, and who did not come to a meeting."""

import threading
import time
from contextlib import suppress
from typing import Protocol

import torch.distributed as dist

PULSE = 1.0  # s between two signs of life


class Member(Protocol):
    """What a pulse tells of its rank."""

    rank: int
    size: int
    meetings: int


class Pulse:
    """A thread that writes signs of life into the store that all ranks see.

    A sign is a count that grows, and the number of meetings that the rank has come to.
    """

    def __init__(self, ranks: Member):
        self.ranks, self.beats = ranks, 0
        self.store = dist.PrefixStore(f"lorakit/{_next_number()}", _store())
        self.over = threading.Event()
        self._beat()
        self.thread = threading.Thread(target=self._run, name="lorakit pulse", daemon=True)
        self.thread.start()

    def look_around(self) -> tuple[list[int], list[int]]:
        """Return the ranks that give no sign of life, and those that are behind this one."""
        with suppress(RuntimeError):  # whoever looks around may end before others do
            self.store.set(f"looked/{self.ranks.rank}", "")
        before = self._signs()
        if not before:  # rank 0, or the torchrun beside it, held the store
            return [0] if self.ranks.rank else [], []
        time.sleep(5 * PULSE)
        after = self._signs()
        if not after:  # rank 0 has looked around, and ended
            return [], []
        others = [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]
        silent = [r for r in others if before[r] == after[r] and not self._looked(r)]
        behind = [rank for rank in others if after[rank][1] < self.ranks.meetings]
        return silent, behind

    def _looked(self, rank: int) -> bool:
        try:
            return self.store.check([f"looked/{rank}"])
        except RuntimeError:
            return False

    def end(self) -> None:
        """Stop the thread."""
        self.over.set()
        self.thread.join()

    def _signs(self) -> list[tuple[int, int]]:
        """Return the sign of each rank, (0, 0) before its first; [] if the store is gone."""
        found = []
        try:
            for rank in range(self.ranks.size):
                there = self.store.check([str(rank)])
                beats, meetings = self.store.get(str(rank)).split() if there else (0, 0)
                found.append((int(beats), int(meetings)))
        except RuntimeError:
            return []
        return found

    def _beat(self) -> None:
        self.beats += 1
        self.store.set(str(self.ranks.rank), f"{self.beats} {self.ranks.meetings}")

    def _run(self) -> None:
        while not self.over.wait(PULSE):
            try:
                self._beat()
            except RuntimeError:
                return


_groups = 0  # how many groups this process has made


def _next_number() -> int:
    global _groups
    _groups += 1
    return _groups


def _store() -> dist.Store:
    """Return the store of the processes, which torchrun or rank 0 holds."""
    return dist.distributed_c10d._get_default_store()
