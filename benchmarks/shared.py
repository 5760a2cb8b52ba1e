"""Machines that are shared, made on one that is not: other processes that compute, and quotas.

A quota is Linux's: of a control group's own, made below the root of the hierarchy that has the
processors (cgroups(7)), which takes the right to write there. It holds for a block, and the
processes go back to the root's group after it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PERIOD = 100_000  # us, the system's own; a group that has used its quota waits for the next one


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processes computing; they end with the block, or with this process."""
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(100_000))"
    found = [subprocess.Popen([sys.executable, "-S", "-c", spin]) for _ in range(count)]
    try:
        yield
    finally:
        for process in found:
            process.kill()
            process.wait()


@contextmanager
def quota(processes: Sequence[int], processors: float) -> Iterator[None]:
    """Let processes, by number, take no more time together than so many processors have.

    Raises OSError where this process may not make a control group.
    """
    root = Path("/sys/fs/cgroup/cpu")  # version 1
    one = root.is_dir()
    root = root if one else root.parent
    group, time = root / f"lorakit-{os.getpid()}", int(processors * PERIOD)
    group.mkdir()
    try:
        if one:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD), encoding="ascii")
            (group / "cpu.cfs_quota_us").write_text(str(time), encoding="ascii")
        else:
            (group / "cpu.max").write_text(f"{time} {PERIOD}", encoding="ascii")
        _move(processes, group)
        yield
    finally:
        _move(processes, root)
        group.rmdir()


def _move(processes: Sequence[int], group: Path) -> None:
    for process in processes:
        (group / "cgroup.procs").write_text(str(process), encoding="ascii")
