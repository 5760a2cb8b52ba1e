"""Products by groups of rows on a GPU: rows of one expert, which lie together, by its own matrix.

    rows       Y[m] = X[m] W_e^T or X[m] W_e, e the expert of row m; and the same of a second pair
    columns    C_e  = s A^T B over the rows of e
    summed     Y[t] = sum over j of X[places[t, j]]

The host knows how many rows there are, and not how many of them an expert has. So there are as many
programs as the worst case takes, every expert with a row more than whole tiles. A program finds its
tile from the bounds of the groups, which it adds up, and ends at once if there is none for it.

A tile begins with the first row of an expert and has ROWS of them, and each row of it is summed by
itself, in steps that do not depend on the number of rows. So no row changes a bit of another's
result. There are no atomics.

A low-rank update is a second pair of the same sum, in fp32: it takes no launch and no pass over Y.
Dense weights of experts that do not lie in one memory are read where they are, by their addresses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch

ROWS = 64  # of a tile
WIDTH, DEPTH = 256, 128  # bytes of a tile's row, and of a row that is multiplied at a time
BESIDE = 8  # tiles of rows that go through the columns together: a weight is read once for them
WARPS = 4
BLOCK, THREADS = 1024, 128  # of `summed`


@triton.jit
def _tile(BOUNDS, tile, count, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a tile, its first row, and the end of the expert's rows: 0 if there is none."""
    each = tl.arange(0, EXPERTS)
    start = tl.load(BOUNDS + each, mask=each < count, other=0)
    end = tl.load(BOUNDS + each + 1, mask=each < count, other=0)
    tiles = (end - start + ROWS - 1) // ROWS
    through = tl.cumsum(tiles, 0)
    before = through - tiles
    mine = (before <= tile) & (tile < through)
    expert = tl.sum(tl.where(mine, each, 0))
    row = tl.sum(tl.where(mine, start + (tile - before) * ROWS, 0))
    return expert, row, tl.sum(tl.where(mine, end, 0))


@triton.jit
def _added(
    y, X, W, row, inside, n, N, K, x_stride, TRANSPOSED: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Y plus rows of X times W [N, K] transposed, or, TRANSPOSED, times W [K, N]."""
    depth = tl.arange(0, DEPTH)
    for start in range(0, K, DEPTH):
        k = start + depth
        x = tl.load(
            X + row[:, None] * x_stride + k[None, :], mask=inside[:, None] & (k < K)[None, :],
            other=0.0,
        )  # fmt: skip
        known = (k < K)[:, None] & (n < N)[None, :]
        if TRANSPOSED:
            w = tl.load(W + k[:, None] * N + n[None, :], mask=known, other=0.0)
        else:
            w = tl.load(W + k[:, None] + n[None, :] * K, mask=known, other=0.0)
        y = tl.dot(x, w, y, input_precision="ieee")
    return y


@triton.jit
def _rows(
    X, W, LOW, S, BIAS, FACTOR, Y, BOUNDS, count, tiles, N, K, R, x_stride, w_stride, low_stride,
    s_stride, y_stride, TRANSPOSED: tl.constexpr, ADDS: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    program, widths = tl.program_id(0), tl.cdiv(N, WIDTH)
    first = program // (BESIDE * widths) * BESIDE
    beside = tl.minimum(tiles - first, BESIDE)
    program = program % (BESIDE * widths)
    expert, row, end = _tile(BOUNDS, first + program % beside, count, ROWS, EXPERTS)
    if end > 0:
        m = row + tl.arange(0, ROWS)
        n = program // beside * WIDTH + tl.arange(0, WIDTH)
        inside, m = m < end, m.to(tl.int64)
        dtype: tl.constexpr = X.dtype.element_ty
        if W.dtype.element_ty == tl.int64:  # addresses
            of_expert = tl.multiple_of(tl.load(W + expert).to(tl.pointer_type(dtype)), 16)
        else:
            of_expert = W + expert.to(tl.int64) * w_stride
        y = tl.zeros((ROWS, WIDTH), tl.float32)
        y = _added(y, X, of_expert, m, inside, n, N, K, x_stride, TRANSPOSED, DEPTH)
        if LOW is not None:
            small = S + expert.to(tl.int64) * s_stride
            y = _added(y, LOW, small, m, inside, n, N, R, low_stride, TRANSPOSED, RANK)
        if BIAS is not None:
            bias = tl.load(BIAS + expert.to(tl.int64) * N + n, mask=n < N, other=0.0)
            bias = bias.to(tl.float32)[None, :]
            if FACTOR is not None:
                bias *= tl.load(FACTOR + m, mask=inside, other=0.0).to(tl.float32)[:, None]
            y += bias
        at = Y + m[:, None] * y_stride + n[None, :]
        known = inside[:, None] & (n < N)[None, :]
        if ADDS:
            y += tl.load(at, mask=known, other=0.0).to(tl.float32)
        tl.store(at, y.to(Y.dtype.element_ty), mask=known)


@triton.jit
def _columns(
    A, B, C, BOUNDS, P, Q, a_stride, b_stride, scaling,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    expert, widths = tl.program_id(1), tl.cdiv(Q, WIDTH)
    p = tl.program_id(0) // widths * HEIGHT + tl.arange(0, HEIGHT)
    q = tl.program_id(0) % widths * WIDTH + tl.arange(0, WIDTH)
    start, end = tl.load(BOUNDS + expert), tl.load(BOUNDS + expert + 1)
    c = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for row in range(start, end, ROWS):
        m = row + tl.arange(0, ROWS)
        inside, at = (m < end)[:, None], m.to(tl.int64)[:, None]
        a = tl.load(A + at * a_stride + p[None, :], mask=inside & (p < P)[None, :], other=0.0)
        b = tl.load(B + at * b_stride + q[None, :], mask=inside & (q < Q)[None, :], other=0.0)
        c = tl.dot(tl.trans(a), b, c, input_precision="ieee")
    at = (expert.to(tl.int64) * P + p)[:, None] * Q + q[None, :]
    known = (p < P)[:, None] & (q < Q)[None, :]
    tl.store(C + at, (c * scaling).to(C.dtype.element_ty), mask=known)


@triton.jit
def _summed(X, PLACES, Y, H, PICKS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for j in range(PICKS):
        place = tl.load(PLACES + token * PICKS + j)
        y += tl.load(X + place * H + at, mask=at < H, other=0.0).to(tl.float32)
    tl.store(Y + token * H + at, y.to(Y.dtype.element_ty), mask=at < H)


def _side(n: int, most: int) -> int:
    """Return the side of a tile for n numbers: a power of two, 16 at least, as tl.dot needs it."""
    return max(16, min(most, triton.next_power_of_2(n)))


def _stages() -> int:
    """Return how many steps of a sum are in shared memory at a time; AMD's has 64 KB."""
    return 2 if dispatch.compiles_to() == "amdgcn" else 3


def rows(
    x: Tensor, weight: Tensor, bounds: Tensor, y: Tensor, low: Tensor | None = None,
    small: Tensor | None = None, *, bias: Tensor | None = None, factors: Tensor | None = None,
    transposed: bool = False, adds: bool = False,
) -> None:  # fmt: skip
    """Write x W_e^T + low S_e^T, or with `transposed` x W_e + low S_e, to y; `adds`: add it to y.

    Args:
        x: [M, K], rows of any stride.
        weight: W [E, N, K], transposed [E, K, N], or the addresses of each expert's, int64 [E],
            whose values have x's dtype.
        bounds: where the rows of each expert begin, and where the last ones end, int32 [E + 1].
        y: [M, N], rows of any stride. What lies outside of the bounds stays.
        low: [M, R], rows of any stride, or None.
        small: S [E, N, R], transposed [E, R, N].
        bias: [E, N], which is added to the products of each expert, or None.
        factors: what the bias is multiplied by in each row, [M, 1]; None for 1.
        transposed: Which way W and S are multiplied.
        adds: Whether y keeps what it has, and the products are added.
    """
    (M, K), N, count = x.shape, y.shape[1], len(bounds) - 1
    tiles = min(M, (M + count * (ROWS - 1)) // ROWS)
    R, low_stride, s_stride = 0, 0, 0
    if low is not None and small is not None:
        R, low_stride, s_stride = low.shape[1], low.stride(0), small.stride(0)
    width, depth = _side(N, WIDTH // x.itemsize), _side(K, DEPTH // x.itemsize)
    if tiles and N:
        dispatch.launch(
            _rows, (tiles * -(-N // width),), x, weight, low, small, bias, factors, y, bounds,
            count, tiles,
            N, K, R, x.stride(0), weight.stride(0), low_stride, s_stride, y.stride(0), transposed,
            adds, triton.next_power_of_2(count), ROWS, width, depth, _side(R, depth), BESIDE,
            num_warps=WARPS, num_stages=_stages(),
        )  # fmt: skip


def columns(a: Tensor, b: Tensor, bounds: Tensor, dtype: torch.dtype, scaling: float) -> Tensor:
    """Return s a^T b over the rows of each expert, [E, P, Q], for a [M, P] and b [M, Q]."""
    P, Q, count = a.shape[1], b.shape[1], len(bounds) - 1
    found = torch.empty((count, P, Q), dtype=dtype, device=a.device)
    height, width = _side(P, ROWS), _side(Q, WIDTH // a.itemsize)
    if found.numel():
        dispatch.launch(
            _columns, (-(-P // height) * -(-Q // width), count), a, b, found, bounds, P, Q,
            a.stride(0), b.stride(0), scaling, DEPTH // a.itemsize, height, width,
            num_warps=WARPS, num_stages=_stages(),
        )  # fmt: skip
    return found


def summed(x: Tensor, places: Tensor) -> Tensor:
    """Return the sum of the rows of x [M, H] that places int64 [n, k] names, [n, H]."""
    (n, picks), H = places.shape, x.shape[1]
    y = torch.empty((n, H), dtype=x.dtype, device=x.device)
    if y.numel():
        dispatch.launch(
            _summed, (n, -(-H // BLOCK)), x, places, y, H, picks, BLOCK,
            num_warps=THREADS // dispatch.lanes(),
        )  # fmt: skip
    return y
