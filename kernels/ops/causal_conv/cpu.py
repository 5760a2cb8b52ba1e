"""Calls of the C++ kernels in cpu.cpp, in host memory, for fp32 and bf16.

The gradient of the weights, which a frozen model does not ask for, is made in plain torch.
"""

import ctypes
import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ...autograd import once_differentiable
from ...dispatch import CPU_DTYPES, INT64, POINTER, address, run
from ..attention.cpu import dense_rows
from . import reference

TOKENS, MOST = 32, 8  # tokens of a block, and columns of the weight at most, as in cpu.cpp


class CausalConv(ctypes.Structure):
    """`CausalConv` of cpu.cpp: the arguments of both directions."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "dy", "y", "dx", "weight", "state", "blocks")),
        *((name, INT64) for name in ("count", "T", "C", "K")),
        *((name, INT64) for name in ("x_row", "x_token", "dy_row", "dy_token")),
    )


def fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels take the operands."""
    return x.dtype in CPU_DTYPES and weight.shape[1] <= MOST and x.numel() > 0


@functools.lru_cache(maxsize=16)  # all layers of a model, in both directions, ask for one
def _blocks(B: int, lengths: tuple[int, ...]) -> Tensor:
    """Return `Block[]` of cpu.cpp for the documents in each row."""
    ends = list(accumulate(lengths))
    blocks = [
        (b, end - length, end, first)
        for b in range(B)
        for length, end in zip(lengths, ends, strict=True)
        for first in range(end - length, end, TOKENS)
    ]
    return torch.tensor(blocks, dtype=torch.int64, device="cpu")


def _launch(
    op: str,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    lengths: tuple[int, ...],
    **tensors: Tensor,
) -> None:
    blocks, dy = _blocks(len(x), lengths), tensors.get("dy", x)
    (x_row, x_token), (dy_row, dy_token) = x.stride()[:2], dy.stride()[:2]
    pointers = {"x": x, "weight": weight, "state": state, "blocks": blocks, **tensors}
    arguments = CausalConv(
        **{name: address(t) for name, t in pointers.items()},
        **dict(zip("TCK", (*x.shape[1:], len(weight)), strict=True)),
        count=len(blocks),
        x_row=x_row,
        x_token=x_token,
        dy_row=dy_row,
        dy_token=dy_token,
    )
    run(op, x.dtype, arguments)


class CausalConvolution(torch.autograd.Function):
    """Map x [B, T, C] and weight [C, K] to y [B, T, C]."""

    @staticmethod
    def forward(ctx, x, weight, state, lengths):
        x, columns = dense_rows(x), weight.t().float().contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch("causal_conv", x, columns, state, lengths, y=y)
        ctx.save_for_backward(x, weight, columns, state)
        ctx.lengths = lengths
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight, columns, state), dx, dw = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            dy = dense_rows(dy)
            _launch("causal_conv_backward", x, columns, state, ctx.lengths, dy=dy, dx=dx)
        if ctx.needs_input_grad[1]:
            dw = reference.weight_gradient(x, weight, state, ctx.lengths, dy)
        return dx, dw, None, None


def causal_conv(
    x: Tensor, weight: Tensor, state: Tensor | None, lengths: Sequence[int] | None
) -> Tensor:
    """Convolve x [B, T, C] by weight [C, K] and apply SiLU: [B, T, C] in x's dtype."""
    state = None if state is None else state.detach().float().contiguous()
    lengths = (x.shape[1],) if lengths is None else tuple(lengths)
    return CausalConvolution.apply(x, weight, state, lengths)
