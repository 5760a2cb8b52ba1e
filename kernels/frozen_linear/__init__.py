"""Products with a frozen weight that is stored packed, as an `NF4Tensor` or an `Int8Tensor`.

    y = x W'^T + b          dx = dy W'          db = sum of dy

W' is the dequantized weight in the dtype of x. Forward makes it, multiplies and forgets it;
backward makes it again. Between the two only the packed weight is kept, at the price of one more
dequantization, which is small beside the product itself from a few dozen rows on.

`dequantize` and `dequantize_rows` take either kind; the latter is the look-up of an embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..int8 import Int8Tensor, dequantize_int8, dequantize_int8_rows
from ..nf4 import NF4Tensor, dequantize_nf4, dequantize_nf4_rows

Packed = NF4Tensor | Int8Tensor


def dequantize(q: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The dense tensor, of shape `q.shape` and in `dtype` (default: the original's)."""
    return dequantize_nf4(q, dtype) if isinstance(q, NF4Tensor) else dequantize_int8(q, dtype)


def dequantize_rows(q: Packed, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of q [N, K], picked by `rows` int64 [...]: [..., K]. Only they are dequantized.

    Raises IndexError for a row that is not there.
    """
    pick = dequantize_nf4_rows if isinstance(q, NF4Tensor) else dequantize_int8_rows
    return pick(q, rows, dtype)


def frozen_linear(x: Tensor, q: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transpose of a packed weight [N, K], plus bias [N]: [..., N] in x's
    dtype.

    Differentiable in x and bias.
    """
    return _FrozenLinear.apply(x, q, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q, bias):
        ctx.q = q
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, dequantize(q, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # [..., N] @ [N, K] -> [..., K]
        grad_x = grad @ dequantize(ctx.q, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias
