"""The memory that a run has used, what the C library keeps for it, and sizes as text."""

import ctypes
import platform
import resource
import sys

import torch

from lorakit.training.units import format_bytes, parse_bytes

__all__ = ["format_bytes", "parse_bytes", "peak_memory_mb", "tune_allocator"]

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
