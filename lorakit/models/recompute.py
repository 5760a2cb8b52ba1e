"""Gradient checkpointing (arXiv:1604.06174): a block keeps its input and is computed again.

Autograd hands every tensor that it would save for backward to a hook, which keeps a number instead.
The first number that backward asks for runs the block again, with the state of the random
generators and of autocast that the first run had. The hooks of that run keep the tensors, in the
same order. When the last one is there the run is cut short, and each tensor is let go of as it is
used.

torch.utils.checkpoint does the same for any function, and much else; but its first call imports
torch's compiler, which takes a second and 150 MB of memory. While a compiler traces, it is called
all the same: the compiler knows it. `offload` is the compiler's business then (offload.py is not
asked).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lorakit import kernels
from lorakit.kernels import pretend
from lorakit.models.offload import Offload, OffloadedInput


def run_recomputed(
    block: Callable[..., Tensor], x: Tensor, *rest: Any, offload: Offload | None = None
) -> Tensor:
    """Return block(x, *rest), and keep only x and `rest` for backward; see the module.

    Args:
        block: A module or function that computes the same when it runs again.
        x: Its input.
        *rest: Its further arguments.
        offload: Where x waits for backward in host memory; None keeps it where it is.

    Returns:
        What the block returns.

    Raises:
        RuntimeError: In backward, if the second run saves another number of tensors than the first.
    """
    if kernels.dispatch.traces():  # a compiler knows torch's own
        return checkpoint(block, x, *rest, use_reentrant=False)
    run = _Run(block, x, rest, offload)
    with saved_tensors_hooks(run.number, run.tensor):
        return block(x, *rest)


class _Run:
    """One run of a block, and what backward will ask of it."""

    def __init__(
        self,
        block: Callable[..., Tensor],
        x: Tensor,
        rest: tuple[Any, ...],
        offload: Offload | None,
    ):
        self.block, self.rest = block, rest
        self.requires_grad = x.requires_grad
        self.x: Tensor | OffloadedInput = x.detach()
        if offload is not None:
            self.x = offload.put(x)
        self.count = 0  # tensors that the first run saved
        self.found: dict[int, Tensor] = {}  # those of the second run, by their numbers
        self.random = _random_state(x.device)
        self.autocast: torch.autocast | nullcontext[None] = nullcontext()
        if pretend.autocasts(x.device):
            kind = x.device.type
            self.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind))

    def number(self, tensor: Tensor) -> int:
        """Return the number that is kept in the place of a tensor of the first run."""
        self.count += 1
        return self.count - 1

    def tensor(self, number: int) -> Tensor:
        """Return to backward the tensor that this number stands for."""
        if number not in self.found:
            self._run_again()
        return self.found.pop(number)

    def _run_again(self) -> None:
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> None:
            found.append(tensor.detach())  # so that nothing of this run's graph stays
            if len(found) == self.count:
                raise _Enough

        x = self.x.take() if isinstance(self.x, OffloadedInput) else self.x
        x = x.detach().requires_grad_(self.requires_grad)
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


class _Enough(Exception):
    """The last tensor that backward needs has been computed."""


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the state of the host's generator and, for a GPU, of that device's.

    A CUDA graph cannot set the latter, and what is recorded draws nothing from it.
    """
    on_gpu = None
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        on_gpu = torch.cuda.get_rng_state(device)
    return torch.get_rng_state(), on_gpu


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    on_host, on_gpu = state
    torch.set_rng_state(on_host)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)


@contextmanager
def _as_before(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Let the generators start from `state`; afterwards they go on as if nothing had been drawn."""
    now = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(now, device)
