"""Memory that a run has used, memory in large pages, and memory that the allocator keeps."""

import ctypes
import platform
import resource
import sys

import torch

# of mallopt, in glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """The most memory so far, in MB (10^6 bytes).

    On a GPU what torch has allocated there; on the CPU the resident memory of the whole process,
    libraries and mapped files included.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB, macOS in bytes
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def tune_allocator() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones, in this process and
    from now on; whether it did, which is only on glibc (most Linux systems).

    By default glibc maps large tensors anew and gives freed memory back, and the system takes a
    microsecond for each fresh page of 4 KB. What it costs: the process keeps the most memory that
    it ever had, and its peak may rise by some percent, as nothing returns from the middle of the
    heap (docs/performance.md has both). `lorakit train` calls it; a program that uses the library
    decides for itself.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*option) for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)))
