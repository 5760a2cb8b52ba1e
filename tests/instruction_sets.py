"""The C++ kernels for one instruction set of the machine after the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from lorakit import kernels
from lorakit.kernels import dispatch

ISAS = dispatch.runnable() if dispatch.library() else []  # the best last


@contextmanager
def on_cpu(isa: str | None = None) -> Iterator[None]:
    """Ops run their C++ kernels, for `isa` or the best."""
    dispatch.sizes_function.cache_clear()
    chosen = mock.patch.object(dispatch, "isa", return_value=isa or ISAS[-1])
    with chosen, kernels.use_backend("cpu"):
        yield
    dispatch.sizes_function.cache_clear()
