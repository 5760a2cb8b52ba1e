"""The operators of packed weights: made dense, and multiplied by."""

from typing import Any

import torch
from torch import Tensor

from ..ops import frozen_linear as products
from ..ops import nf4
from ..ops.frozen_linear.dense import Packed
from ..ops.nf4 import NF4Tensor
from .library import Kept, define, gradient
from .packed import packed, parts

define(
    "dequantize_nf4",
    "(Tensor[] weight, str form, ScalarType dtype) -> Tensor",
    lambda held, form, dtype: nf4.dequantize_nf4(_nf4(held, form), dtype),
    lambda held, form, dtype: held[0].new_empty(packed(held, form).shape, dtype=dtype),
)
define(
    "dequantize_nf4_rows",
    "(Tensor[] weight, str form, Tensor rows, ScalarType dtype) -> Tensor",
    lambda held, form, rows, dtype: nf4.dequantize_nf4_rows(
        _nf4(held, form), rows, dtype
    ).contiguous(),
    lambda held, form, rows, dtype: held[0].new_empty(
        (*rows.shape, packed(held, form).shape[1]), dtype=dtype
    ),
)


def _nf4(held: list[Tensor], form: str) -> NF4Tensor:
    q = packed(held, form)
    assert isinstance(q, NF4Tensor)
    return q


def _multiply(x: Tensor, bias: Tensor | None, held: list[Tensor], form: str) -> Tensor:
    return products.frozen_linear(x, packed(held, form), bias).contiguous()


def _multiply_back(grad: Tensor, held: list[Tensor], form: str) -> Tensor:
    ctx = Kept(q=packed(held, form), needs_input_grad=(True, False, False))
    dx, _, _ = products.FrozenLinear.backward(ctx, grad)
    return dx.contiguous()


define(
    "frozen_linear",
    "(Tensor x, Tensor? bias, Tensor[] weight, str form) -> Tensor",
    _multiply,
    lambda x, bias, held, form: x.new_empty(x.shape[0], packed(held, form).shape[0]),
)
define(
    "frozen_linear_backward",
    "(Tensor grad, Tensor[] weight, str form) -> Tensor",
    _multiply_back,
    lambda grad, held, form: grad.new_empty(grad.shape[0], packed(held, form).shape[1]),
)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, bias, held, ctx.form = inputs
    ctx.save_for_backward(*held)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    of_x, of_bias, *_ = ctx.needs_input_grad
    held = list(ctx.saved_tensors)
    dx = torch.ops.lorakit.frozen_linear_backward(grad, held, ctx.form) if of_x else None
    return dx, grad.sum(0).to(ctx.bias_dtype) if of_bias else None, [None] * len(held), None


gradient("frozen_linear", _keep, _backward)


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None) -> Tensor:
    """Make q dense, in `dtype` or the original's."""
    return torch.ops.lorakit.dequantize_nf4(*parts(q), dtype or q.dtype)


def dequantize_nf4_rows(q: NF4Tensor, rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Make rows of q dense, in `dtype` or the original's."""
    return torch.ops.lorakit.dequantize_nf4_rows(*parts(q), rows, dtype or q.dtype)


def frozen_linear(x: Tensor, q: Packed, bias: Tensor | None) -> Tensor:
    """Return x [..., K] q^T + bias, [..., N]."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.ops.lorakit.frozen_linear(flat, bias, *parts(q))
    return y.view(*x.shape[:-1], y.shape[1])
