"""What stands around the backward of an op, with few calls of Python in a step.

A decoder layer is seven autograd functions. torch's `once_differentiable` takes some twenty calls
of Python for each; a context of torch's, such as `autocast`, ten. What either does matters in few
steps, and is asked for in those.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from .pretend import autocasts


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a backward whose results cannot be differentiated again.

    It is torch's wrapper of that name, which has nothing to do unless backward itself is recorded,
    as `create_graph=True` asks: then who differentiates again gets its error.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a backward that no autocast around it may change."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        device = grads[0].device
        if not autocasts(device):
            return backward(ctx, *grads)
        with torch.autocast(device.type, enabled=False):
            return backward(ctx, *grads)

    return run
