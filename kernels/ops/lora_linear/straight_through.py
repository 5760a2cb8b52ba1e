"""A linear layer whose weight is the quantized sum of base and update, for merge-aware training.

With W' = Q(W + s B A), where Q rounds to a format of few bits:

    y  = x W'^T + b
    dx = dy W'
    dA = s (dy B)^T x
    dB = s dy^T (x A^T)

Q is flat nearly everywhere, so its derivative is zero and would teach A and B nothing. The backward
pass takes Q for the identity: the straight-through estimator (arXiv:1308.3432). dL/dW' = dy^T x is
then the gradient of s B A, and A and B get theirs from products of rank r. No N x K gradient is
formed.

The low-rank path is no part of y: the update has its effect through W' alone. So y is bit for bit
that of a layer which stores W', and gradient and model fit each other at what will be served.

Backward keeps x and W' as it is stored. `weight` may be a function that makes W' dense, for formats
that no kernel multiplies by; it is called in forward and in backward, and what it returns is
forgotten.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch
from ...autograd import once_differentiable, without_autocast
from ..frozen_linear import packed_product, packed_product_back
from ..frozen_linear.dense import Packed
from .reference import gradient

QuantizedWeight = Packed | Callable[[torch.dtype], Tensor]
"""W' [N, K], packed, or a function that makes it dense in a dtype."""


def straight_through_linear(
    x: Tensor,
    weight: QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply by W' = Q(W + s B A), with the gradients of W + s B A (arXiv:1308.3432).

    Differentiable in x, A, B and the bias.

    Args:
        x: [..., K], any floating-point dtype.
        weight: W' [N, K], made of the A and B that are given.
        lora_A: A [r, K].
        lora_B: B [N, r].
        scaling: s.
        bias: [N], or None.

    Returns:
        x W'^T + bias, [..., N] in x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = StraightThrough.apply(flat, weight, scaling, lora_A, lora_B, bias)
    return y.view(*x.shape[:-1], y.shape[1])


class StraightThrough(torch.autograd.Function):
    """Map x [M, K] to y [M, N]."""

    @staticmethod
    def forward(ctx, x, weight, scaling, A, B, bias):
        ctx.weight, ctx.scaling = weight, scaling
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, A, B)
        if isinstance(weight, Packed):
            return packed_product(x, weight, bias)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight(x.dtype), bias)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        x, A, B = ctx.saved_tensors
        weight, s = ctx.weight, ctx.scaling
        needs_x, _, _, needs_A, needs_B, needs_bias = ctx.needs_input_grad
        dtype = dispatch.product_dtype(grad)
        dx = dA = dB = None
        if needs_x and isinstance(weight, Packed):
            dx = packed_product_back(grad, weight).to(x.dtype)
        elif needs_x:
            dx = (grad.to(dtype) @ weight(dtype)).to(x.dtype)
        dy, wide = grad.to(dtype), x.to(dtype)
        if needs_A:  # s (dy B)^T x: [r, M] @ [M, K]
            dA = gradient((dy @ (s * B).to(dtype)).t(), wide, A.dtype)
        if needs_B:  # s dy^T (x A^T): [N, M] @ [M, r]
            dB = gradient(dy.t(), F.linear(wide, A.to(dtype)), B.dtype, s)
        db = grad.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return dx, None, None, dA, dB, db
