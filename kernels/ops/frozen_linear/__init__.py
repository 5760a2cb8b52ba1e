"""Products with a frozen weight that is stored packed, as an `NF4Tensor` or an `Int8Tensor`.

    y = x W'^T + b          dx = dy W'          db = sum of dy

W' is the dequantized weight in the dtype of x, or in fp32 where the processor has no products of 16
bits (`dispatch.product_dtype`); y and dx are rounded to their dtypes once. Forward makes it,
multiplies and forgets it; backward makes it again. Between the two only the packed weight is kept,
at the price of one more dequantization, which is small beside the product itself from a few dozen
rows on. For fewer rows an NF4 weight is multiplied by as it is packed (`FEW_ROWS`), on a CPU in the
forward pass.

In bf16 on a CPU that has instructions for it no weight is made dense (`products`). Elsewhere a CPU
makes it dense a panel of rows at a time, PANEL values, which the caches hold until they are
multiplied, and which is all the memory that it takes. On a GPU it is made whole:
torch's allocator hands the next layer the same memory.

`dequantize` and `dequantize_rows` take either kind; the latter is the look-up of an embedding.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from ..int8 import Int8Tensor, dequantize_int8, dequantize_int8_rows
from ..nf4 import NF4Tensor, cpu, dequantize_nf4, dequantize_nf4_panels, dequantize_nf4_rows
from ..products import Sum, Term, available, dense_rows, sums_of_products, takes

Packed = NF4Tensor | Int8Tensor
Panels = Iterable[tuple[slice, Tensor]]  # which rows, and these, dense: [rows, K]

PANEL = 1 << 20  # values: 4 MB in fp32


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
# The same of the C++ kernel, by instruction set and dtype: as far as it was the faster one for all
# of 4096 x 4096, 1536 x 576 and 576 x 1536 (Zen 5). In fp32 on AVX-512 it still is for 64 rows, but
# torch's product used AVX2 alone. Scalar code never is for more than one row.
FEW_ROWS_CPU = {
    ("avx2", torch.float32): 16,
    ("avx512", torch.float32): 32,
    ("avx512bf16", torch.float32): 32,
    ("avx512bf16", torch.bfloat16): 32,
}


def dequantize(q: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The dense tensor, of shape `q.shape` and in `dtype` (default: the original's)."""
    return dequantize_nf4(q, dtype) if isinstance(q, NF4Tensor) else dequantize_int8(q, dtype)


def dequantize_rows(q: Packed, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of q [N, K], picked by `rows` int64 [...]: [..., K]. Only they are dequantized.

    Raises IndexError for a row that is not there.
    """
    pick = dequantize_nf4_rows if isinstance(q, NF4Tensor) else dequantize_int8_rows
    return pick(q, rows, dtype)


def panels(w: Tensor | Packed, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of w [N, K], packed or of another dtype, made dense PANEL values at a time. They may
    share one memory: each panel holds until the next is asked for.
    """
    N, K = w.shape
    together = math.lcm(w.block_size, K) // K if isinstance(w, NF4Tensor) and K else 1
    step = max(1, PANEL // max(1, K * together)) * together  # so that panels begin with a block
    if step >= N and not isinstance(w, Tensor):
        yield slice(0, N), dequantize(w, dtype)
        return
    if isinstance(w, NF4Tensor):
        yield from dequantize_nf4_panels(w, step, dtype)
        return
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        if isinstance(w, Tensor):
            yield rows, w[rows].to(dtype)
        else:
            picked = torch.arange(rows.start, rows.stop, device=w.device)
            yield rows, dequantize_int8_rows(w, picked, dtype)


def weight_panels(w: Tensor | Packed, dtype: torch.dtype) -> Panels:
    """`panels` on a CPU; elsewhere, and where it is dense already, the whole of w."""
    if isinstance(w, Tensor) and w.dtype == dtype:
        return [(slice(0, w.shape[0]), w)]
    if w.device.type == "cpu":
        return panels(w, dtype)
    dense = w.to(dtype) if isinstance(w, Tensor) else dequantize(w, dtype)
    return [(slice(0, w.shape[0]), dense)]


def product(x: Tensor, weight: Panels, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times the transpose of a weight [N, K] that comes in panels, plus bias: [M, N]"""
    parts = [dispatch.linear(x, W, None if bias is None else bias[rows]) for rows, W in weight]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def product_back(grad: Tensor, weight: Panels, total: Tensor | None = None) -> Tensor:
    """grad [M, N] times a weight [N, K] that comes in panels, added to `total` [M, K] if there is
    one: [M, K]
    """
    for rows, W in weight:
        if total is None:
            total = dispatch.linear(grad[:, rows], W.t())
        elif dispatch.asks_onednn(grad, W):
            total += dispatch.linear(grad[:, rows], W.t())
        else:
            total.addmm_(grad[:, rows], W)
    return total


def frozen_linear(x: Tensor, q: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transpose of a packed weight [N, K], plus bias [N]: [..., N] in x's
    dtype.

    Differentiable in x and bias.
    """
    y = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), q, bias)
    return y.view(*x.shape[:-1], y.shape[1])


def _takes(x: Tensor, q: Packed) -> bool:
    """Whether x can be multiplied by q as it is packed."""
    takes = isinstance(q, NF4Tensor) and len(q.shape) == 2 and q.shape[1] % q.block_size == 0
    return takes and not torch.is_autocast_enabled(x.device.type)  # which follows torch's products


def _few_rows(x: Tensor, q: Packed) -> FewRows:
    """What counts as few rows for a product of x with q by Triton; none where it must be
    dequantized.
    """
    if not _takes(x, q) or not dispatch.triton_runs(x):
        return FewRows(0, 0)
    if dispatch.compiles_to() == "amdgcn":
        return FEW_ROWS_AMD
    known = [at for at in FEW_ROWS if at <= dispatch.capability(x.device)]
    return FEW_ROWS[max(known)] if known else FewRows(0, 0)


def _few_rows_cpu(x: Tensor, q: Packed, dtype: torch.dtype) -> int:
    """The same of the C++ kernel, in products of `dtype`."""
    if dtype not in dispatch.CPU_DTYPES or dispatch.pick(x.device, "cpu") != "cpu":
        return 0
    return FEW_ROWS_CPU.get((dispatch.isa(), dtype), 0) if _takes(x, q) else 0


def _sums(x: Tensor, q: Packed) -> bool:
    """Whether the products with q, as it is packed, are those of `products`."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return len(x) > 0 and available(x) and takes(q) and not autocast


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q, bias):
        ctx.q = q
        ctx.bias_dtype = None if bias is None else bias.dtype
        few = _few_rows(x, q)
        if not 0 < len(x) <= max(few):
            wide = dispatch.product_dtype(x)
            if 0 < len(x) <= _few_rows_cpu(x, q, wide):
                y = cpu.product(x.to(wide), q, None if bias is None else bias.float())
            elif _sums(x, q):
                y = x.new_empty(len(x), q.shape[0])
                bias = None if bias is None else bias.float()
                sums_of_products([Sum([Term(dense_rows(x), q, True)], y, bias=bias)])
            else:
                bias = None if bias is None else bias.to(wide)
                y = product(x.to(wide), weight_panels(q, wide), bias)
            return y if wide == x.dtype else y.to(x.dtype)  # autocast may have chosen another
        from . import triton

        multiply = triton.vector if len(x) <= few.one_by_one else triton.forward
        with dispatch.on_device(x):
            return multiply(x, q, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # [M, N] @ [N, K] -> [M, K]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            if _sums(grad, ctx.q):
                grad_x = grad.new_empty(len(grad), ctx.q.shape[1])
                sums_of_products([Sum([Term(dense_rows(grad), ctx.q, False)], grad_x)])
            elif not 0 < len(grad) <= _few_rows(grad, ctx.q).by_tiles:
                wide = dispatch.product_dtype(grad)
                grad_x = product_back(grad.to(wide), weight_panels(ctx.q, wide)).to(grad.dtype)
            else:
                from . import triton

                with dispatch.on_device(grad):
                    grad_x = triton.backward(grad, ctx.q)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias
