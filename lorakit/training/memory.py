"""The memory that a run has used, what the C library keeps for it, and sizes as text."""

import ctypes
import gc
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from lorakit.kernels.processors import groups
from lorakit.training.units import format_bytes, parse_bytes

__all__ = ["format_bytes", "free_memory", "parse_bytes", "peak_memory_mb", "tune_allocator"]

# Settings of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """Return the most memory that was in use so far, in MB (10^6 bytes).

    Args:
        device: A CUDA device, for the memory that torch has allocated there; or the CPU, for the
            resident memory of the whole process, libraries and mapped files included.

    Returns:
        The peak since the process started.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB, macOS in bytes
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def forget_peak(device: torch.device | str = "cpu") -> None:
    """Let the peak of memory begin again from what is in use now, where the system can do that.

    What was freed goes back to the system first. Linux forgets the peak of a process that asks for
    it; elsewhere, and where /proc may not be written to, it stays.
    """
    gc.collect()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def free_memory(device: torch.device | str = "cpu") -> int:
    """Return how many bytes this process may still take.

    Args:
        device: A CUDA device, for what is free there or kept by torch's allocator; or the CPU, for
            what Linux calls available, or what the limits of the control groups leave if that is
            less. Elsewhere than on Linux it is the whole memory of the machine.

    Returns:
        The bytes.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_memory()


def free_host_memory(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that are left; /proc and /sys lie under `root`."""
    left = list(_left_of_groups(root))
    try:
        meminfo = (root / "proc/meminfo").read_text(encoding="ascii")
        [available] = re.findall(r"^MemAvailable: +([0-9]+) kB$", meminfo, re.MULTILINE)
        left.append(int(available) << 10)
    except (OSError, ValueError):
        left.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0, min(left))


def _left_of_groups(root: Path) -> Iterator[int]:
    """Yield how many bytes each control group that holds this process has left.

    What a group uses includes files that the kernel keeps in memory and would give back;
    memory.stat says how much of them was not asked for lately.
    """
    for group in groups("memory", root):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with suppress(OSError, ValueError):  # "max" is no number: there is no limit
                most, used = (int((group / name).read_text()) for name in (limit, usage))
                stat = (group / "memory.stat").read_text()
                files = re.search(r"^inactive_file ([0-9]+)$", stat, re.MULTILINE)
                yield most - used + (int(files[1]) if files else 0)


def tune_allocator() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones, from now on.

    By default glibc maps each large tensor freshly and gives freed memory back, and the system
    takes a microsecond for each fresh page of 4 KB. The cost of keeping: the process holds the most
    memory that it ever had, and its peak may rise by some percent, because no memory returns from
    the middle of the heap (docs/performance.md has figures). `lorakit train` calls this function. A
    program that uses the library decides for itself.

    Returns:
        Whether the settings were made. They exist only in glibc, so on most Linux systems.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*option) for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)))
