"""How many threads torch and the kernels should have on a CPU.

A thread more than the process has processors for makes all others wait at the end of every loop. So
there are as many as

    affinity    the processors that the process may run on (taskset, cpusets)
    quota       the time of processors that its control group may take, rounded up: a container with
                `--cpus 1.5` has two threads, which the system stops for a quarter of the time

allow, but what was set by hand stays: OMP_NUM_THREADS, MKL_NUM_THREADS, or torch.set_num_threads
with another number than torch itself takes, which is all processors, or one for every two of them.

Whether other processes want the processors too is told by how long a thread that could go on has
waited for one. Linux counts that, and stops for a quota with it; times of use tell less, since a
thread that waits for the disk uses no processor either.
"""

import functools
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

SET_BY_HAND = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@functools.cache
def fit() -> None:
    """Take torch's threads down to what the process may use, unless they were set by hand."""
    if not set_by_hand():
        torch.set_num_threads(min(torch.get_num_threads(), usable()))


def set_by_hand() -> bool:
    """Return whether somebody has said how many threads torch has."""
    processors = _affinity()
    by_itself = torch.get_num_threads() in (processors, (processors + 1) // 2, usable())
    return not by_itself or any(name in os.environ for name in SET_BY_HAND)


def waited(root: Path = Path("/")) -> float | None:
    """Return how long the thread that asks could have gone on, but had no processor.

    Args:
        root: The directory under which /proc lies.

    Returns:
        Seconds since the thread began, or None where the system does not tell.
    """
    try:  # ns with a processor, ns without one, turns; Linux's sched-stats
        _, without, _ = (root / "proc/thread-self/schedstat").read_text(encoding="ascii").split()
        return int(without) / 1e9
    except (OSError, ValueError):
        return None


def usable(root: Path = Path("/")) -> int:
    """Return how many threads the process has processors for.

    Args:
        root: The directory under which /proc and /sys lie.
    """
    limit = quota(root)
    return max(1, _affinity() if limit is None else min(_affinity(), math.ceil(limit)))


def quota(root: Path = Path("/")) -> float | None:
    """Return how many processors' time the control group of the process may take.

    Each group up to the root may have a limit, and the lowest counts. A process in a container may
    see names of groups that are those of its host; then the root is its own group.

    Args:
        root: The directory under which /proc and /sys lie.

    Returns:
        The number of processors, or None if there is no limit, or nothing to tell it by.
    """
    found = [limit for group in groups("cpu", root) for limit in _limits(group)]
    return min(found, default=None)


def groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Yield the directories of the control groups that hold the process, in both versions.

    Args:
        controller: What the groups control: "cpu" or "memory".
        root: The directory under which /proc and /sys lie.

    Yields:
        Each group up to the root of each tree. Some may not exist.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:  # number:controllers:path; cgroups(7)
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # version 1 mounts a tree under the names of all its controllers, with links for each
        for name in (controller, "cpu,cpuacct") if controllers else ("", "unified"):
            mount = root / "sys/fs/cgroup" / name
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts) + 1):
                yield mount.joinpath(*parts[:depth])


def _limits(group: Path) -> Iterator[float]:
    """Yield the limit of one group, of version 2 (cpu.max) or version 1, if it has one."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # "max" is no number: there is no limit
            text = " ".join((group / name).read_text(encoding="utf-8") for name in names)
            quota, period = (int(number) for number in text.split())
            if quota > 0 and period > 0:  # -1: no limit
                yield quota / period


def _affinity() -> int:
    """Return the number of processors that the process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
