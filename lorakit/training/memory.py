"""Memory that a run has used, memory in large pages, and memory that the allocator keeps."""

import ctypes
import math
import mmap
import platform
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # of x86-64, and of aarch64 with pages of 4 KB
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


def in_large_pages(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """Tensors side by side in host memory, zeros, which Linux is asked to back by pages of 2 MB.

    Reading 270 MB of weights from end to end is 8 % faster than from pages of 4 KB
    (docs/dev/LOG.md): fewer address translations, and prefetching does not stop at every page. Each
    tensor has a storage of its own; the memory is given back when the last of them is gone.
    """
    sizes = [-(-math.prod(shape) * dtype.itemsize // 64) * 64 for shape in shapes]
    total = sum(sizes)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a forked process writes into a copy
    region = mmap.mmap(-1, total + HUGE_PAGE, flags=private)
    start = -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    whole = total // HUGE_PAGE * HUGE_PAGE  # the rest would fill a page that is not needed
    if sys.platform == "linux" and whole:
        with suppress(OSError):  # a kernel without such pages
            region.madvise(mmap.MADV_HUGEPAGE, start, whole)
    tensors = []
    for shape, size in zip(shapes, sizes, strict=True):
        flat = torch.frombuffer(region, dtype=dtype, count=math.prod(shape), offset=start)
        tensors.append(flat.view(*shape))
        start += size
    return tensors


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
