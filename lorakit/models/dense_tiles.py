"""Long rows through a gated MLP whose own weights train, a tile at a time (arXiv:2506.13996).

Under gradient checkpointing a block runs again right before its backward, and plain autograd would
then hold gate, up and their product for all positions: 3 I values for each, at I of 14,336 some
80 KB in bfloat16. Here backward gets the input and the weights, and computes one tile after another
again. So that the second run of the block computes no MLP in vain, it is two steps of autograd, as
with adapters (kernels/ops/lora_linear/passes.py): the first keeps what backward needs, and what
follows keeps nothing.

The gradient of a weight is a sum over the tiles, in their order. It is added in fp32, since the sum
of a long row would lose small gradients in bfloat16: 4 bytes for each weight of one MLP.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.kernels import pretend
from lorakit.kernels.autograd import once_differentiable, without_autocast
from lorakit.kernels.ops.lora_linear.passes import TILE
from lorakit.models.hooks import has_hooks, has_own_forward

ROWS = TILE
"""Positions that are computed at once, as many as with adapters."""


def takes_tiles(x: Tensor, layers: Sequence[nn.Module]) -> bool:
    """Return whether rows x [..., H] go through gate, up and down in tiles."""
    if x.numel() <= ROWS * x.shape[-1] or kernels.dispatch.traces() or pretend.autocasts(x.device):
        return False
    return all(
        type(each) is nn.Linear and not has_hooks(each) and not has_own_forward(each)
        for each in layers
    )


def tiled_mlp(x: Tensor, layers: Sequence[nn.Module], hidden_act: str) -> Tensor:
    """Return down(activation(gate(x)) * up(x)) of x [..., H], with little memory in backward.

    Args:
        x: [..., H].
        layers: gate and up, [I, H], and down, [H, I].
        hidden_act: The activation.

    Returns:
        [..., H].
    """
    tensors = [t for each in layers for t in (each.weight, each.bias)]
    flat = _Input.apply(x.reshape(-1, x.shape[-1]), hidden_act, *tensors)
    y: Tensor = _Output.apply(flat, hidden_act, tensors)
    return y.view(x.shape)


def _mlp(x: Tensor, tensors: Sequence[Tensor | None], hidden_act: str) -> Tensor:
    gate, gate_bias, up, up_bias, down, down_bias = tensors
    assert gate is not None
    assert up is not None
    assert down is not None  # biases may be
    hidden = kernels.gated(F.linear(x, gate, gate_bias), F.linear(x, up, up_bias), hidden_act)
    return F.linear(hidden, down, down_bias)


def _tiles(rows: int) -> Iterator[slice]:
    """Yield tiles of about the same number of rows."""
    size = -(-rows // -(-rows // ROWS))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class _Input(torch.autograd.Function):
    """Map x [M, H] to itself, and keep what backward needs. Its gradient comes as that of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden_act: str, *tensors: Tensor | None) -> Tensor:
        ctx.hidden_act = hidden_act
        ctx.save_for_backward(x, *tensors)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs_x else None
        leaves = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(tensors, needs, strict=True)
        ]
        trained = [t for t in leaves if t is not None and t.requires_grad]
        sums = [torch.zeros_like(t, dtype=_wide(t)) for t in trained]
        for rows in _tiles(len(x)):
            part = x[rows].detach().requires_grad_(needs_x)
            wanted = [part, *trained] if needs_x else trained
            with torch.enable_grad():
                y = _mlp(part, leaves, ctx.hidden_act)
            found = list(torch.autograd.grad(y, wanted, grad[rows]))
            del y
            if dx is not None:
                dx[rows] = found.pop(0)
            for total, each in zip(sums, found, strict=True):
                total += each
        left = iter(sums)
        of_tensors = [
            next(left).to(t.dtype) if t is not None and t.requires_grad else None for t in leaves
        ]
        return dx, None, *of_tensors


class _Output(torch.autograd.Function):
    """Map what `_Input` returned to y [M, H], and keep nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden_act: str, tensors: Sequence[Tensor | None]) -> Tensor:
        y = torch.empty_like(x)
        for rows in _tiles(len(x)):
            y[rows] = _mlp(x[rows], tensors, hidden_act)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def _wide(t: Tensor) -> torch.dtype:
    """Return the dtype that gradients of t are added in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32
