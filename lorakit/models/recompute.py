"""Gradient checkpointing (arXiv:1604.06174): for backward a block keeps what it was given, and
computes all else again right before its backward.

Autograd hands every tensor that it would save to a hook, which keeps a number instead. The first
number that backward asks for runs the block again, with the state of the random generators and of
autocast that the first run had, and the hooks of that run keep the tensors, in the same order. When
the last one is there the run is cut short, and each tensor is let go of as it is used.

torch.utils.checkpoint does the same for any function, and much else; but its first call imports
torch's compiler, which takes a second and 150 MB of memory.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Enough(Exception):
    """The last tensor that backward needs has been computed."""


class _Run:
    """One run of a block, and what backward will ask of it."""

    def __init__(
        self, block: Callable[..., Tensor], x: Tensor, rest: tuple[Any, ...], offload: bool
    ):
        self.block, self.rest = block, rest
        self.device, self.needs = x.device, x.requires_grad
        self.x = _to_host(x) if offload else x.detach()
        self.count, self.found = 0, {}
        self.random = _random_state(x.device)
        kind = x.device.type
        self.autocast = nullcontext()
        if torch.is_autocast_enabled(kind):
            self.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind))

    def number(self, tensor: Tensor) -> int:
        self.count += 1
        return self.count - 1

    def tensor(self, number: int) -> Tensor:
        if number not in self.found:
            self.again()
        return self.found.pop(number)

    def again(self) -> None:
        found = []

        def keep(tensor: Tensor) -> None:
            found.append(tensor.detach())  # of this run's graph nothing is to stay
            if len(found) == self.count:
                raise _Enough

        # from the host the copy is made in the order of the stream: it waits for its writing
        x = self.x.to(self.device, non_blocking=True).detach().requires_grad_(self.needs)
        with torch.enable_grad(), self.autocast, _as_before(self.random, x.device):
            try:
                with saved_tensors_hooks(keep, lambda nothing: nothing):
                    self.block(x, *self.rest)
            except _Enough:
                pass
        if len(found) != self.count:
            raise RuntimeError(
                f"gradient checkpointing: a block saved {self.count} tensors for backward and "
                f"{len(found)} when it ran again; did it change in between?"
            )
        self.found = dict(enumerate(found))


def checkpoint(
    block: Callable[..., Tensor], x: Tensor, *rest: Any, offload: bool = False
) -> Tensor:
    """block(x, *rest), which keeps nothing but x, and `rest` as it is, for backward; with `offload`
    x in host memory.
    """
    run = _Run(block, x, rest, offload)
    with saved_tensors_hooks(run.number, run.tensor):
        return block(x, *rest)


def _to_host(x: Tensor) -> Tensor:
    """A copy of x in host memory, from a GPU pinned and written while the GPU goes on."""
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
    return host.copy_(x.detach(), non_blocking=True)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


@contextmanager
def _as_before(state: tuple[Tensor, Tensor | None], device: torch.device):
    """Inside the block the generators start from `state`; afterwards they go on as if nothing had
    been drawn.
    """
    now = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    on_host, on_gpu = state
    torch.set_rng_state(on_host)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)
