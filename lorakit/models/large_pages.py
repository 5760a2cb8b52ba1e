"""Host memory in large pages, for a model's weights.

Linux backs memory by pages of 4 KB, or of 2 MB where it is asked to (transparent huge pages).
Reading 270 MB of weights from end to end is 8 % faster from large pages (docs/dev/LOG.md): the
processor translates fewer addresses, and its prefetching does not stop at every small page. On
other systems the memory is like any other.
"""

import math
import mmap
import re
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

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


def homes_in_large_pages(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return memory in large pages for dense matrices and packed codes, by parameter.

    Matrices of one layer that are smaller than a large page lie side by side. Memory that is taken
    while loading, between its temporaries, would leave holes in the heap.
    """
    groups: dict[tuple[str, torch.dtype], dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        dense = parameter.dim() == 2 and parameter.dtype == dtype
        if dense or parameter.dtype in (torch.uint8, torch.int8):
            layer = re.match(r"model\.layers\.\d+\.", name)
            small = layer is not None and parameter.nbytes < HUGE_PAGE
            key = layer.group() if layer is not None and small else name
            groups.setdefault((key, parameter.dtype), {})[name] = parameter
    homes: dict[str, Tensor] = {}
    for (_, kind), group in groups.items():
        places = in_large_pages([parameter.shape for parameter in group.values()], kind)
        homes |= zip(group, places, strict=True)
    return homes
