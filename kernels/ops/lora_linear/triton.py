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

In backward dy is read once for two products that torch would read it for twice:

    dlow = dy sB    sums over columns        dB = s dy^T low    sums over rows

A program takes a strip of columns and a share of the rows. It keeps its dB in registers while it
walks down, and writes a part of dlow for each tile, which another launch adds up in a fixed order.
Parts are fp32: some 4 r (1 / COLUMNS + 1 / rows of a share) of the bytes of dy. How work is cut
depends on shapes alone, so that the bits are those of any GPU.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

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
from ..swiglu.triton import padded_rank

MOST = 3  # layers of one launch: q, k and v
BLOCK, WARPS = 1024, 4
VALUES = 2 * PASSES * BYTES  # of a program
SB_ROWS, SB_VALUES = 64, 4096  # of a program, at most
MOST_ROWS = 65_535  # of x: the second dimension of an activation's grid has no more
# Of a strip: rows of a tile, values of dB in registers, columns at most, and threads. There are
# PROGRAMS at most, and each walks over LEAST rows, or more.
STRIP_ROWS, STRIP_VALUES, STRIP_COLUMNS, STRIP_THREADS = 64, 8192, 256, 256
PROGRAMS, LEAST = 256, 256
SUMMED, SUM_THREADS = 512, 128


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


# ---- s dy B and dB from one reading of dy ----


@triton.jit
def _strips(
    X0, X1, X2, SB0, SB1, SB2, LOW, PARTS, SMALL, M, stride0, stride1, stride2, low_row, n0, n1, n2,
    r0, r1, r2, s1, s2, share, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A part of s dy B for each tile of rows, and of dy^T low for all of them."""
    strip, zero = tl.program_id(0), tl.full((), 0, tl.int32)
    X, SB, stride, N, r = X0, SB0, zero + stride0, zero + n0, zero + r0
    first, column, before = zero, zero, zero
    if strip >= s2:
        X, SB, stride, N, r = X2, SB2, zero + stride2, zero + n2, zero + r2
        first, column, before = zero + s2, zero + (r0 + r1), zero + (n0 + n1)
    elif strip >= s1:
        X, SB, stride, N, r = X1, SB1, zero + stride1, zero + n1, zero + r1
        first, column, before = zero + s1, zero + r0, zero + n0
    at, k = tl.arange(0, ROWS), tl.arange(0, RANK)
    n = (strip - first) * COLUMNS + tl.arange(0, COLUMNS)
    of_layer = (n < N)[:, None] & (k < r)[None, :]
    sB = tl.load(SB + n[:, None] * r + k[None, :], mask=of_layer, other=0.0)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, M)
    sums = tl.zeros((COLUMNS, RANK), tl.float32)
    for row in range(begin, end, ROWS):
        m, wide = row + at, tl.full((), 0, tl.int64) + row
        inside = (m < end)[:, None]
        source = X + wide * stride + at[:, None] * stride + n[None, :]
        x = tl.load(source, mask=inside & (n < N)[None, :], other=0.0)
        source = LOW + wide * low_row + at[:, None] * low_row + (column + k)[None, :]
        low = tl.load(source, mask=inside & (k < r)[None, :], other=0.0)
        target = PARTS + (strip.to(tl.int64) * M + wide) * width + at[:, None] * width + k[None, :]
        tl.store(target, tl.dot(x, sB), mask=inside & (k < r)[None, :])
        sums = tl.dot(tl.trans(x), low, sums)
    target = SMALL + tl.program_id(1).to(tl.int64) * (n0 + n1 + n2) * width
    tl.store(target + (before + n)[:, None] * width + k[None, :], sums, mask=of_layer)


@triton.jit
def _sums(
    PARTS, SMALL, DLOW, FOUND, M, low_row, R, shares, n0, n1, n2, r0, r1, r2, s1, s2, s3,
    f0, f1, f2, width, of_low, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the parts of `_strips` up, strip after strip and share after share."""
    program, at, zero = tl.program_id(0), tl.arange(0, BLOCK), tl.full((), 0, tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    if program < of_low:
        m, c = (program * BLOCK + at) // R, (program * BLOCK + at) % R
        second, third = c >= r0, c >= r0 + r1
        k = c - tl.where(third, r0 + r1, tl.where(second, r0, 0))
        first = tl.where(third, s2, tl.where(second, s1, 0))
        last = tl.where(third, s3, tl.where(second, s2, s1))
        source = PARTS + (first.to(tl.int64) * M + m) * width + k
        for i in range(tl.maximum(s1, tl.maximum(s2 - s1, s3 - s2))):
            known = (m < M) & (first + i < last)
            total += tl.load(source + (zero + i) * M * width, mask=known, other=0.0)
        at_low = DLOW + m.to(tl.int64) * low_row + c
        tl.store(at_low, total.to(DLOW.dtype.element_ty), mask=m < M)
    else:
        N, e = n0 + n1 + n2, (program - of_low) * BLOCK + at
        row, column = e // width, e % width
        after0, after1 = row >= n0, row >= n0 + n1
        r = tl.where(after1, r2, tl.where(after0, r1, r0))
        mine = (row < N) & (column < r)
        for i in range(shares):
            total += tl.load(SMALL + (zero + i) * N * width + e, mask=mine, other=0.0)
        row -= tl.where(after1, n0 + n1, tl.where(after0, n0, 0))
        start = tl.where(after1, n0 * r0 + n1 * r1, tl.where(after0, n0 * r0, 0))
        total *= tl.where(after1, f2, tl.where(after0, f1, f0))
        tl.store(FOUND + start + row * r + column, total.to(FOUND.dtype.element_ty), mask=mine)


class Parts(NamedTuple):
    """Parts of dlow and of dB, which are still to be added up."""

    of_low: Tensor  # fp32 [strips, M, r], each layer's strips after those of the one before
    small: Tensor  # fp32 [shares, N, r], the rows of each layer's dB after those of the one before
    strips: list[int]  # of each layer


def parts(M: int, widths: Sequence[int], rank: int, strips: list[int], on: torch.device) -> Parts:
    """Return memory for the parts of M rows and of layers of these widths, of `rank` at most."""
    found = sum(strips)
    shares = -(-M // share_of(M, found))
    of_low = torch.empty((found, M, rank), dtype=torch.float32, device=on)
    small = torch.empty((shares, sum(widths), rank), dtype=torch.float32, device=on)
    return Parts(of_low, small, strips)


def share_of(M: int, strips: int) -> int:
    """Return how many of M rows a program walks over."""
    shares = max(1, min(PROGRAMS // strips, M // LEAST))
    return -(-M // (shares * STRIP_ROWS)) * STRIP_ROWS


def add_up(
    found: Parts, ranks: Sequence[int], widths: Sequence[int], scalings: Sequence[float],
    dlow: Tensor, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Write the sums to dlow [M, R], and return those of each layer times its scaling, [N, r]."""
    M, missing, (shares, N, width) = dlow.shape[0], MOST - len(widths), found.small.shape
    sizes = [n * r for n, r in zip(widths, ranks, strict=True)]
    flat = torch.empty(sum(sizes), dtype=dtype, device=dlow.device)
    s1, s2, s3 = itertools.accumulate([*found.strips, *[0] * (MOST - len(found.strips))])
    of_low = -(-dlow.numel() // SUMMED)
    dispatch.launch(
        _sums, (of_low + -(-N * width // SUMMED),), found.of_low, found.small, dlow, flat, M,
        dlow.stride(0), dlow.shape[1], shares, *widths, *[0] * missing, *ranks, *[0] * missing,
        s1, s2, s3, *scalings, *[0.0] * missing, width, of_low, SUMMED,
        num_warps=SUM_THREADS // dispatch.lanes(),
    )  # fmt: skip
    each = zip(flat.split_with_sizes(sizes), widths, ranks, strict=True)
    return [part.view(n, r) for part, n, r in each]


def of_gradients(
    grads: list[Tensor], sBs: list[Tensor], low: Tensor, scalings: Sequence[float],
    dlow: Tensor, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Write s dy B of each layer to dlow [M, R], and return its dB = s dy^T low, [N, r].

    Args:
        grads: dy [M, N] of each layer, whose rows may lie apart.
        sBs: s B [N, r] of each, contiguous.
        low: x A^T of all layers side by side, [M, R].
        scalings: s of each.
        dlow: where the products go, whose rows may lie apart.
        dtype: of dB.
    """
    M, missing = len(low), MOST - len(grads)
    widths, ranks = [sB.shape[0] for sB in sBs], [sB.shape[1] for sB in sBs]
    depth = padded_rank(*ranks)
    columns = min(STRIP_COLUMNS, STRIP_VALUES // depth)
    columns = columns // 2 if dispatch.compiles_to() == "amdgcn" else columns
    strips = [-(-n // columns) for n in widths]
    found = parts(M, widths, max(ranks), strips, low.device)
    s1, s2, *_ = itertools.accumulate([*strips, 0, 0])
    share = share_of(M, sum(strips))
    dispatch.launch(
        _strips, (sum(strips), len(found.small)), *grads, *grads[:1] * missing, *sBs,
        *sBs[:1] * missing, low, found.of_low, found.small, M, *[dy.stride(0) for dy in grads],
        *[0] * missing, low.stride(0), *widths, *[0] * missing, *ranks, *[0] * missing, s1, s2,
        share, max(ranks), STRIP_ROWS, columns, depth,
        num_warps=STRIP_THREADS // dispatch.lanes(), num_stages=2,
    )  # fmt: skip
    return add_up(found, ranks, widths, scalings, dlow, dtype)
