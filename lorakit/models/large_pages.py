"""Host memory in large pages, for a model's weights.

Linux backs memory by pages of 4 KB, or of 2 MB where it is asked to (transparent huge pages).
Reading 270 MB of weights from end to end is 8 % faster from large pages (docs/dev/LOG.md): the
processor translates fewer addresses, and its prefetching does not stop at every small page. On
other systems the memory is like any other.
"""

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
"""The bytes of a large page on x86-64, and on aarch64 with small pages of 4 KB."""


def in_large_pages(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of zeros, side by side in host memory that Linux may back by large pages.

    There is one tensor for each of `shapes`, with a storage of its own. The memory is given back
    when the last of them is gone.
    """
    sizes = [-(-math.prod(shape) * dtype.itemsize // 64) * 64 for shape in shapes]
    total = sum(sizes)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a forked process writes into a copy
    region = mmap.mmap(-1, total + HUGE_PAGE, flags=private)
    start = -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    whole = total // HUGE_PAGE * HUGE_PAGE  # the rest does not fill a large page
    if sys.platform == "linux" and whole:
        with suppress(OSError):  # a kernel without such pages
            region.madvise(mmap.MADV_HUGEPAGE, start, whole)
    tensors = []
    for shape, size in zip(shapes, sizes, strict=True):
        flat = torch.frombuffer(region, dtype=dtype, count=math.prod(shape), offset=start)
        tensors.append(flat.view(*shape))
        start += size
    return tensors
