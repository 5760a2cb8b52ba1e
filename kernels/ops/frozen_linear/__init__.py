"""Products with a frozen weight that is stored packed, as an `NF4Tensor` or an `Int8Tensor`.

    y = x W'^T + b          dx = dy W'          db = sum of dy

W' is the dequantized weight in the dtype of x, or in fp32 where the processor has no products of 16
bits (`dispatch.product_dtype`); y and dx are rounded to their dtypes once. `reference.py` says it
in two lines. Forward makes W', multiplies by it and forgets it; backward makes it again. Between
the two only the packed weight is kept, at the price of one more dequantization. From a few dozen
rows on that is small beside the product itself.

There are three ways around a dense W':

    few rows    an NF4 weight is multiplied by as it is packed (FEW_ROWS, FEW_ROWS_CPU), on a CPU in
                the forward pass only
    products    on a CPU with AVX2 no weight is made dense (`products`)
    panels      elsewhere on a CPU it is dense for a panel of rows at a time (`dense.py`)
"""

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from ... import dispatch, pretend
from ...autograd import once_differentiable
from ..nf4 import NF4Tensor, cpu
from ..products import Sum, Term, available, dense_rows, sums_of_products, takes
from .dense import Packed, product, product_back, weight_panels


class FewRows(NamedTuple):
    """Up to how many rows a product takes the packed weight: one row at a time, and by tiles."""

    one_by_one: int
    by_tiles: int


# By compute capability; one that is not named has the figures of the next lower one. Those of 9.0
# were measured on an H100 (benchmarks/gpu.md), the others are the rules that bitsandbytes 0.50 was
# calibrated to: benchmarks/gpu.py prints what to write here. Below 8.0 Triton has no matrix
# instructions for the tiles.
FEW_ROWS = {
    (7, 5): FewRows(4, 0),
    (8, 0): FewRows(1, 32),
    (8, 6): FewRows(1, 64),
    (9, 0): FewRows(1, 64),
    (12, 0): FewRows(1, 64),
}
FEW_ROWS_AMD = FewRows(1, 16)
# The same for the C++ kernel, by instruction set and dtype: as far as it was the faster one for all
# of 4096 x 4096, 1536 x 576 and 576 x 1536 (Zen 5). In fp32 on AVX-512 it still is for 64 rows, but
# torch's product used AVX2 alone. Scalar code never is for more than one row.
FEW_ROWS_CPU = {
    ("avx2", torch.float32): 16,
    ("avx512", torch.float32): 32,
    ("avx512bf16", torch.float32): 32,
    ("avx512bf16", torch.bfloat16): 32,
}


def frozen_linear(x: Tensor, q: Packed, bias: Tensor | None = None) -> Tensor:
    """Multiply by a frozen weight that is stored packed.

    Differentiable in x and bias; the weight is frozen. Backward keeps the packed weight alone.

    Args:
        x: [..., K], any floating-point dtype; kernels run for fp32, bf16 and fp16.
        q: the weight [N, K], as an `NF4Tensor` or an `Int8Tensor`.
        bias: [N], or None.

    Returns:
        x W'^T + bias, [..., N] in x's dtype, for the dequantized weight W'.
    """
    if dispatch.traces():
        return dispatch.traced().frozen_linear(x, q, bias)
    y = FrozenLinear.apply(x.reshape(-1, x.shape[-1]), q, bias)
    return y.view(*x.shape[:-1], y.shape[1])


class FrozenLinear(torch.autograd.Function):
    """Map x [M, K] to y [M, N]."""

    @staticmethod
    def forward(ctx, x, q, bias):
        ctx.q = q
        ctx.bias_dtype = None if bias is None else bias.dtype
        return packed_product(x, q, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x = packed_product_back(grad, ctx.q) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias


def packed_product(x: Tensor, q: Packed, bias: Tensor | None) -> Tensor:
    """Return x [M, K] W'^T + bias [N], by the way that is the fastest for M rows."""
    few = few_rows(x, q)
    if 0 < len(x) <= max(few) and isinstance(q, NF4Tensor):
        from . import triton

        multiply = triton.vector if len(x) <= few.one_by_one else triton.forward
        return multiply(x, q, None if bias is None else bias.to(x.dtype))
    wide = dispatch.product_dtype(x)
    if 0 < len(x) <= _few_rows_cpu(x, q, wide) and isinstance(q, NF4Tensor):
        y = cpu.product(x.to(wide), q, None if bias is None else bias.float())
    elif _by_sums(q, x):
        y = x.new_empty(len(x), q.shape[0])
        bias = None if bias is None else bias.float()
        sums_of_products([Sum([Term(dense_rows(x), q, True)], y, bias=bias)])
    else:
        bias = None if bias is None else bias.to(wide)
        y = product(x.to(wide), weight_panels(q, wide), bias)
    return y if wide == x.dtype else y.to(x.dtype)  # autocast may have chosen another


def packed_product_back(grad: Tensor, q: Packed) -> Tensor:
    """Return grad [M, N] W': [M, K]."""
    if _by_sums(q, grad):
        grad_x = grad.new_empty(len(grad), q.shape[1])
        sums_of_products([Sum([Term(dense_rows(grad), q, False)], grad_x)])
        return grad_x
    if 0 < len(grad) <= few_rows(grad, q).by_tiles and isinstance(q, NF4Tensor):
        from . import triton

        return triton.backward(grad, q)
    wide = dispatch.product_dtype(grad)
    return product_back(grad.to(wide), weight_panels(q, wide)).to(grad.dtype)


def _multiplied_packed(x: Tensor, q: Packed) -> bool:
    """Return whether x can be multiplied by q as it is packed."""
    whole = isinstance(q, NF4Tensor) and len(q.shape) == 2 and q.shape[1] % q.block_size == 0
    return whole and not pretend.autocasts(x.device)  # which follows torch's products


def few_rows(x: Tensor, q: Packed) -> FewRows:
    """Return what counts as few rows for a product of x with q by Triton.

    None do where q must be dequantized.
    """
    if not _multiplied_packed(x, q) or not dispatch.triton_runs(x):
        return FewRows(0, 0)
    if dispatch.compiles_to() == "amdgcn":
        return FEW_ROWS_AMD
    known = [at for at in FEW_ROWS if at <= dispatch.capability(x.device)]
    return FEW_ROWS[max(known)] if known else FewRows(0, 0)


def _few_rows_cpu(x: Tensor, q: Packed, dtype: torch.dtype) -> int:
    """Return up to how many rows the C++ kernel takes x and q, in products of `dtype`."""
    if dtype not in dispatch.CPU_DTYPES or dispatch.pick(x.device, "cpu") != "cpu":
        return 0
    return FEW_ROWS_CPU.get((dispatch.isa(), dtype), 0) if _multiplied_packed(x, q) else 0


def _by_sums(q: Packed, x: Tensor) -> TypeGuard[NF4Tensor]:
    """Return whether the products of x with q, as it is packed, are those of `products`."""
    autocast = pretend.autocasts(x.device)
    return len(x) > 0 and available(x) and takes(q) and not autocast
