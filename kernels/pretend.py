"""Devices that are not there: tensors of the meta device, taken for those of a GPU or of a CPU.

Tensors of the meta device have shapes and no memory. Inside of a `with` block of this module the
ops take the way that they would take on the pretended device, and make the same tensors; but no
kernel runs, so that nothing is computed and no such device is needed. What asks for a value of such
a tensor gets an error of torch's. lorakit's forecast of memory and its tests of launches use this.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

H100 = (9, 0)


class Pretended(NamedTuple):
    """What the meta device is taken for."""

    kind: str
    """ "cuda" or "cpu"."""
    capability: tuple[int, int]
    """Compute capability of NVIDIA's GPU."""
    launched: Callable[..., None] | None
    """What is told of each launch: (kernel, arguments)."""


# What each thread pretends. Others only ask whether it is empty, which costs no call. A ContextVar
# is nothing that torch's compiler can trace.
by_thread: dict[int, Pretended] = {}


@contextmanager
def pretend_gpu(
    capability: tuple[int, int] = H100, launched: Callable[..., None] | None = None
) -> Iterator[None]:
    """Take tensors of the meta device for those of an NVIDIA GPU inside the `with` block.

    Args:
        capability: The compute capability of the GPU, (9, 0) for an H100.
        launched: Called with every Triton kernel that would be launched, and with the arguments
            that it would get, a tuple.

    Yields:
        Nothing.
    """
    with _pretend(Pretended("cuda", capability, launched)):
        yield


@contextmanager
def pretend_cpu() -> Iterator[None]:
    """Take tensors of the meta device for those in host memory inside the `with` block.

    The kernels of the C++ library do nothing meanwhile, if it is this thread that calls them.

    Yields:
        Nothing.
    """
    with _pretend(Pretended("cpu", H100, None)):
        yield


@contextmanager
def _pretend(what: Pretended) -> Iterator[None]:
    thread = threading.get_ident()
    before = by_thread.get(thread)
    by_thread[thread] = what
    try:
        yield
    finally:
        if before is None:
            del by_thread[thread]
        else:
            by_thread[thread] = before


def current() -> Pretended | None:
    """Return what this thread takes the meta device for; None outside of a `with` block.

    Other threads go on computing, or pretend something else.
    """
    return by_thread.get(threading.get_ident()) if by_thread else None


def kind_of(device: torch.device) -> str:
    """Return the type of a device; of the meta device, what it is taken for (pretend.py)."""
    if device.type != "meta":  # most often, and often asked
        return device.type
    now = current()
    return device.type if now is None else now.kind


def autocasts(device: torch.device) -> bool:
    """Return whether torch's autocast is on for tensors of `device`; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are views of one memory; it need not have an address."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
