"""A and B of layers that share an input, cast in one launch; and their weights with these as one.

    A    fp32 [r, K] of each layer  ->  stacked [R, K]
    B    fp32 [N, r] of each layer  ->  s B, one after the other in one memory

A layer's two matrices are some hundred thousand values: to cast them takes microseconds, and a
launch for each step of it (two casts, a product, a concatenation) would take longer than that. The
second dimension of the grid counts the matrices, and the programs that a small one does not need
end at once.

With N and R the sums of the layers' outputs and ranks, and low = d(x) A^T:

    J [N + R, K + R]  =  [ W   sB ]        sB has columns of its own for each layer,
                         [ A    . ]        and zeros beside its block

    forward    y  = [x | low] [W | sB]^T          [M, K + R] @ [K + R, N]
    backward   dx = [dy | dlow] [W ; A]           [M, N + R] @ [N + R, K]

One launch makes J from NF4 codes and the small matrices, and one product applies all layers with
their updates: no sum is read and written again for them, and what they add is not rounded before it
is added. low lies beside x, in memory that who made x has left there (`lora_room`): a norm or an
activation writes rows that lie apart at no cost. To copy x would take longer than q, k and v gain.
Products are at their fastest in multiples of 8, so the ranks must add up to one. Rows are a
multiple of 16 long, by which Triton knows that it may access 128 bits at a time.
"""

import functools
from collections.abc import Sequence
from typing import TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from ..nf4 import NF4Tensor
from ..nf4.triton import (
    BYTES,
    PASSES,
    THREADS,
    packed_arguments,
    packed_options,
    scales_of,
    values_of,
)

MOST = 3  # layers of one launch: q, k and v
BLOCK, WARPS = 1024, 4
VALUES = 2 * PASSES * BYTES  # of a program
SB_ROWS, SB_VALUES = 64, 4096  # of a program, at most
MOST_ROWS = 65_535  # of x: the second dimension of an activation's grid has no more


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


@triton.jit
def _weight(
    CODES, SCALES, NESTED, OFFSET, MAP, PAIRS, J, first, K, stride,
    largest: tl.constexpr, DOUBLE: tl.constexpr, PTX: tl.constexpr,
    HALF: tl.constexpr, PASSES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Dequantize a program's bytes from `first` on; a tile's row lies in one row of the weight."""
    row = tl.arange(0, ROWS)
    offset = tl.load(OFFSET)
    for i in tl.static_range(PASSES):
        byte = first + i * (ROWS * TILE) + row * TILE
        packed = tl.load(CODES + byte[:, None] + tl.arange(0, TILE)[None, :])
        scale = scales_of(SCALES, NESTED, offset, MAP, byte // HALF, None, largest, DOUBLE)
        values = values_of(packed, scale, PAIRS, PTX, J.dtype.element_ty)
        n = 2 * byte // K
        at = n.to(tl.int64) * stride + (2 * byte - n * K)
        tl.store(J + at[:, None] + tl.arange(0, 2 * TILE)[None, :], values)


@triton.jit
def _block(SB, n, c, N, r):
    """One layer's s B at rows n and columns c of its own; zeros where it has none."""
    inside = ((n >= 0) & (n < N))[:, None] & ((c >= 0) & (c < r))[None, :]
    return tl.load(SB + n[:, None] * r + c[None, :], mask=inside, other=0.0)


@triton.jit
def _border(
    A, SB, J, program, K, stride, n0, n1, n2, r0, r1, r2,
    SB_ROWS: tl.constexpr, RANKS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Copy a program's rows of s B, or a piece of A."""
    N, R = n0 + n1 + n2, r0 + r1 + r2
    of_sb = tl.cdiv(N, SB_ROWS)
    if program < of_sb:
        n, c = program * SB_ROWS + tl.arange(0, SB_ROWS), tl.arange(0, RANKS)
        values = _block(SB, n, c, n0, r0)
        values += _block(SB + n0 * r0, n - n0, c - r0, n1, r1)
        values += _block(SB + n0 * r0 + n1 * r1, n - n0 - n1, c - r0 - r1, n2, r2)
        at = n.to(tl.int64)[:, None] * stride + K + c[None, :]
        tl.store(J + at, values, mask=(n < N)[:, None] & (c < R)[None, :])
    else:
        source = (program - of_sb) * VALUES + tl.arange(0, VALUES)
        row = source // K
        target = J + (N + row).to(tl.int64) * stride + (source - row * K)
        tl.store(target, tl.load(A + source, mask=row < R, other=0.0), mask=row < R)


@triton.jit
def _join(
    C0, S0, X0, O0, C1, S1, X1, O1, C2, S2, X2, O2, MAP, PAIRS, A, SB, J,
    p0, p1, p2, K, stride, n0, n1, n2, r0, r1, r2,
    largest: tl.constexpr, DOUBLE: tl.constexpr, PTX: tl.constexpr,
    HALF: tl.constexpr, PASSES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SB_ROWS: tl.constexpr, RANKS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < p0:
        _weight(
            C0, S0, X0, O0, MAP, PAIRS, J, program * (VALUES // 2), K, stride,
            largest, DOUBLE, PTX, HALF, PASSES, ROWS, TILE,
        )  # fmt: skip
    elif program < p1:
        _weight(
            C1, S1, X1, O1, MAP, PAIRS, J + n0 * stride.to(tl.int64),
            (program - p0) * (VALUES // 2), K, stride,
            largest, DOUBLE, PTX, HALF, PASSES, ROWS, TILE,
        )  # fmt: skip
    elif program < p2:
        _weight(
            C2, S2, X2, O2, MAP, PAIRS, J + (n0 + n1) * stride.to(tl.int64),
            (program - p1) * (VALUES // 2), K, stride,
            largest, DOUBLE, PTX, HALF, PASSES, ROWS, TILE,
        )  # fmt: skip
    else:
        _border(A, SB, J, program - p2, K, stride, n0, n1, n2, r0, r1, r2, SB_ROWS, RANKS, VALUES)


def joins(weights: Sequence[object], ranks: int) -> TypeGuard[Sequence[NF4Tensor]]:
    """Return whether weights [N, K] with updates of `ranks` in sum can be made one matrix."""
    first = weights[0]
    if ranks % 8 or len(weights) > MOST or not isinstance(first, NF4Tensor):
        return False
    double = first.nested_absmax is not None
    like = first.shape[1:], first.block_size, first.dtype, first.quant_type, double
    for w in weights:
        if not isinstance(w, NF4Tensor) or len(w.shape) != 2:
            return False
        double = w.nested_absmax is not None
        if (w.shape[1:], w.block_size, w.dtype, w.quant_type, double) != like:
            return False
        size = w.shape[0] * w.shape[1]
        if not size or size % VALUES or size >= 2**31:
            return False
    return first.shape[1] % min(first.block_size, 256) == 0


@functools.cache
def _cut(block_size: int, R: int, lanes: int) -> dict[str, int]:
    """Return how `_join` cuts its work."""
    tile = min(block_size // 2, 128)
    of_weights = {"HALF": block_size // 2, "PASSES": PASSES, "ROWS": BYTES // tile, "TILE": tile}
    ranks = max(16, triton.next_power_of_2(R))
    rows = max(1, min(SB_ROWS, SB_VALUES // ranks))  # of more values, registers would spill
    of_border = {"SB_ROWS": rows, "RANKS": ranks, "VALUES": VALUES}
    return {**of_weights, **of_border, "num_warps": THREADS // lanes}


def join(weights: Sequence[NF4Tensor], A: Tensor, sBs: Sequence[Tensor], room: int) -> Tensor:
    """Return J [N + R, K + room] in the dtype of A [R, K] and of s B [N, r], which lie in line.

    The weights must be such as `joins` says.
    """
    first, (R, K), missing = weights[0], A.shape, MOST - len(weights)
    n0, n1, n2 = [*[sB.shape[0] for sB in sBs], *[0] * missing]
    r0, r1, r2 = [*[sB.shape[1] for sB in sBs], *[0] * missing]
    p0, p1, p2 = [*[packed_arguments(w) for w in weights], *[packed_arguments(first)] * missing]
    J = torch.empty((n0 + n1 + n2 + R, K + room), dtype=A.dtype, device=A.device)
    of_0, of_1, of_2 = n0 * K // VALUES, n1 * K // VALUES, n2 * K // VALUES
    of_weights = of_0 + of_1 + of_2
    cut = _cut(first.block_size, R, dispatch.lanes())
    of_border = -(-(n0 + n1 + n2) // cut["SB_ROWS"]) + -(-R * K // VALUES)
    dispatch.launch(
        _join, (of_weights + of_border,), *p0[:4], *p1[:4], *p2[:4], *p0[4:], A, sBs[0], J,
        of_0, of_0 + of_1, of_weights, K, K + room, n0, n1, n2, r0, r1, r2,
        **cut, **packed_options(first),
    )  # fmt: skip
    return J
