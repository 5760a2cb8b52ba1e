"""The threads of the kernels on a CPU: torch's, or their own.

As a rule the kernels run on torch's OpenMP pool. Its threads spin while they wait, and every loop
waits for the slowest of them: where other processes keep the processors busy, a training step of
hundreds of loops takes ten times as long. `own_threads` gives the kernels threads that sleep while
they wait, and loops that wait for nobody who has not come (parallel.cpp). Two pools that spin would
disturb each other, so torch has one thread meanwhile. It is for work whose large products are all
the kernels' own. The number of threads changes no bit of a kernel's result.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import dispatch

MOST = 64  # threads of its own that the library has, as parallel.cpp says

_own = 0  # threads of the kernels' own, while there are any


def count() -> int:
    """Return how many threads a kernel has now."""
    return _own or torch.get_num_threads()


@contextmanager
def own_threads() -> Iterator[None]:
    """Give the kernels on a CPU threads of their own for the block, and torch a single one.

    There are as many as torch had. Inside such a block, and where no kernels are installed, nothing
    changes.

    Yields:
        Nothing; the block runs with the kernels' own threads.
    """
    global _own
    library = dispatch.library()
    before = torch.get_num_threads()
    if library is None or _own or before == 1:
        yield
        return
    _own = min(before, MOST)
    library.lk_set_threads(_own)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        library.lk_set_threads(0)
        _own = 0
