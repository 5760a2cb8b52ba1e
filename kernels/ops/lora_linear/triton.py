"""Casts the A and B of layers that share an input to the compute dtype, in one launch.

    A    fp32 [r, K] of each layer  ->  stacked [R, K]
    B    fp32 [N, r] of each layer  ->  s B, one after the other in one memory

A layer's two matrices are some hundred thousand values: to cast them takes microseconds, and a
launch for each step of it (two casts, a product, a concatenation) would take longer than that. The
second dimension of the grid counts the matrices, and the programs that a small one does not need
end at once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch

MOST = 3  # layers of one launch: q, k and v
BLOCK, WARPS = 1024, 4


@triton.jit
def _piece(X, Y, n, scaling, BLOCK: tl.constexpr):
    """Y = scaling X, for one block of n values."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(Y + at, (x * scaling).to(Y.dtype.element_ty), mask=at < n)


@triton.jit
def _cast(A0, A1, A2, B0, B1, B2, A, SB, a0, a1, a2, b0, b1, b2, s0, s1, s2, BLOCK: tl.constexpr):
    which = tl.program_id(1)
    if which == 0:
        _piece(A0, A, a0, 1.0, BLOCK)
    elif which == 1:
        _piece(B0, SB, b0, s0, BLOCK)
    elif which == 2:
        _piece(A1, A + a0, a1, 1.0, BLOCK)
    elif which == 3:
        _piece(B1, SB + b0, b1, s1, BLOCK)
    elif which == 4:
        _piece(A2, A + a0 + a1, a2, 1.0, BLOCK)
    else:
        _piece(B2, SB + b0 + b1, b2, s2, BLOCK)


def cast(
    As: list[Tensor], Bs: list[Tensor], scalings: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]] | None:
    """Return all A stacked [R, K], and s B [N, r] of each layer, in `dtype`.

    Return None for more layers, other dtypes and other strides than the kernel takes.
    """
    matrices = *As, *Bs
    if len(As) > MOST:
        return None
    for m in matrices:
        if m.dtype not in dispatch.FLOATS or not m.is_contiguous():
            return None
    on, K = As[0].device, As[0].shape[1]
    of_a, of_b = [a.shape[0] * K for a in As], [b.shape[0] * b.shape[1] for b in Bs]
    A = torch.empty((sum([a.shape[0] for a in As]), K), dtype=dtype, device=on)
    flat = torch.empty(sum(of_b), dtype=dtype, device=on)
    filling = MOST - len(As)
    dispatch.launch(
        _cast, (-(-max(*of_a, *of_b, 1) // BLOCK), 2 * len(As)),
        *As, *As[:1] * filling, *Bs, *Bs[:1] * filling, A, flat, *of_a, *[0] * filling,
        *of_b, *[0] * filling, *scalings, *[0.0] * filling, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    parts = flat.split_with_sizes(of_b)
    return A, [part.view(b.shape) for part, b in zip(parts, Bs, strict=True)]
