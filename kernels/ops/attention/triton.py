"""Attention over documents on a GPU, from tables of tiles (documents.py) and without T x S memory.

    forward    o_i = sum_j p_ij v_j        p_ij = 2^(s_ij - lse_i)        lse_i = log2 sum_j 2^s_ij
    backward   delta_i = do_i . o_i        ds_ij = p_ij (do_i . v_j - delta_i)
               dv_j = sum_i p_ij do_i      dk_j = sum_i ds_ij q_i         dq_i = sum_j ds_ij k_j

s is in base 2: scale log2(e) q_i . k_j, or with a soft cap c, log2(e) c tanh(scale q_i . k_j / c),
whose slope enters ds. Forward holds a tile of queries and walks over the keys that it may see, with
a running maximum and sum (arXiv:2205.14135). It keeps y and lse. Backward computes p again, in two
kernels: one holds a tile of queries for dq, one a tile of keys for dk and dv, which walks over the
queries of all heads of its group. So nothing is added by two programs, there are no atomics, and
the bits are the same every time.

All queries see a row's first keys, whose program takes twice the mean. So tiles with the most work
come first, each with all heads. Where a dense row has too few programs to fill the GPU meanwhile,
several share the query heads of a group, and their dk and dv, in fp32, are added in order. Packed
rows never do this, since a document's bits would then depend on what lies beside it.

Only blocks at the edge of what a tile sees are masked. Positions count from the document's first
token, and the pointers move there once. So offsets fit 32 bits, and no bit depends on where a
document lies.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from ...autograd import once_differentiable
from .documents import Documents, equal_documents
from .sinks import sinks_gradient, with_sinks

LOG2E = tl.constexpr(1.4426950408889634)
DELTA_VALUES, SUMMED = 4096, 1024  # of y that a program of delta reads; sums that one makes


class Tiling(NamedTuple):
    """How a kernel cuts its work: tokens of a tile and of a step, warps, and steps in flight."""

    tile: int
    step: int
    warps: int
    stages: int


class Tilings(NamedTuple):
    """The tilings of the three kernels that multiply."""

    forward: Tiling
    dq: Tiling
    dkv: Tiling


@triton.jit
def _scores(a, b, scale, cap: tl.constexpr):
    """Scores in base 2 of a [M, D] and b [N, D], one of them queries, the other keys: [M, N]."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    if cap is None:
        s *= scale * LOG2E
    else:
        s = (2 * tl.sigmoid(s * (2 * scale / cap)) - 1) * (cap * LOG2E)  # tanh x = 2 s(2x) - 1
    return s


@triton.jit
def _seen(rows, columns, length, window: tl.constexpr):
    """Which keys at `columns` the queries at `rows` see, both counted within one document."""
    seen = (columns <= rows) & (rows < length)
    if window is not None:
        seen &= columns > rows - window
    return seen


@triton.jit
def _rows_at(X, first, token, length, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr):
    """Rows [first, first + N) of a document X: [N, BD]; zeros from `length` on, and from D on."""
    at, d = tl.arange(0, N), tl.arange(0, BD)
    source = X + (tl.full((), 0, tl.int64) + first) * token + at[:, None] * token + d[None, :]
    mask = (first + at < length)[:, None]
    if BD != D:
        mask &= (d < D)[None, :]
    return tl.load(source, mask=mask, other=0.0)


@triton.jit
def _store_rows(
    X, first, token, length, values, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr
):
    """Write values [N, BD] to the rows [first, first + N) of a document X that are its own."""
    at, d = tl.arange(0, N), tl.arange(0, BD)
    target = X + (tl.full((), 0, tl.int64) + first) * token + at[:, None] * token + d[None, :]
    mask = (first + at < length)[:, None]
    if BD != D:
        mask &= (d < D)[None, :]
    tl.store(target, values.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _first_key(row, window: tl.constexpr, BN: tl.constexpr):
    """Return where the walk of a tile of queries from `row` on begins, a multiple of BN."""
    first = row * 0
    if window is not None:
        first = tl.maximum(row - window + 1, 0) // BN * BN
    return first


@triton.jit
def _partly(row, last_row, column, last_column, window: tl.constexpr):
    """Whether some query of a block does not see some of its keys."""
    partly = last_column > row
    if window is not None:
        partly |= column <= last_row - window
    return partly


@triton.jit
def _forward(
    Q, K, V, Y, LSE, TILES, tokens, q_token, q_head, k_token, k_head, v_token, v_head, y_token,
    y_head, scale, group: tl.constexpr, window: tl.constexpr, cap: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), TILES + 3 * tl.program_id(1)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    row, length, key_head = first - begin, end - begin, head // group
    Q += begin.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    K += begin.to(tl.int64) * k_token + key_head.to(tl.int64) * k_head
    V += begin.to(tl.int64) * v_token + key_head.to(tl.int64) * v_head
    at = tl.arange(0, BM)
    rows = row + at
    q = _rows_at(Q, row, q_token, length, D, BD, BM)
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for j in range(_first_key(row, window, BN), tl.minimum(row + BM, length), BN):
        k = _rows_at(K, j, k_token, length, D, BD, BN)
        s = _scores(q, k, scale, cap)
        columns = j + tl.arange(0, BN)
        if _partly(row, row + BM - 1, j, j + BN - 1, window):
            s = tl.where(_seen(rows[:, None], columns[None, :], length, window), s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # a query that has seen no key yet
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        total = total * shrink + tl.sum(p, 1)
        v = _rows_at(V, j, v_token, length, D, BD, BN)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = top
    inside = rows < length
    Y += begin.to(tl.int64) * y_token + head.to(tl.int64) * y_head
    total = tl.where(inside, total, 1.0)
    _store_rows(Y, row, y_token, length, acc / total[:, None], D, BD, BM)
    tl.store(LSE + head.to(tl.int64) * tokens + first + at, m + tl.log2(total), mask=inside)


@triton.jit
def _delta(
    Y, DY, DELTA, tokens, y_token, y_head, dy_token, dy_head,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, d = tl.program_id(1), tl.arange(0, BD)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (rows < tokens)[:, None] & (d < D)[None, :]
    wide = rows[:, None].to(tl.int64)
    y = tl.load(Y + wide * y_token + head.to(tl.int64) * y_head + d[None, :], mask=mask, other=0.0)
    dy = tl.load(
        DY + wide * dy_token + head.to(tl.int64) * dy_head + d[None, :], mask=mask, other=0.0
    )
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    tl.store(DELTA + head.to(tl.int64) * tokens + rows, delta, mask=rows < tokens)


@triton.jit
def _ds(p, difference, s, cap: tl.constexpr):
    """The gradient of the scores without the scale: p (dy . v - delta), and the cap's slope."""
    ds = p * difference
    if cap is not None:
        t = s / (cap * LOG2E)
        ds *= 1 - t * t
    return ds


@triton.jit
def _dq(
    Q, K, V, DY, LSE, DELTA, DQ, TILES, tokens, q_token, q_head, k_token, k_head, v_token, v_head,
    dy_token, dy_head, dq_token, dq_head, scale,
    group: tl.constexpr, window: tl.constexpr, cap: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), TILES + 3 * tl.program_id(1)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    row, length, key_head = first - begin, end - begin, head // group
    Q += begin.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    K += begin.to(tl.int64) * k_token + key_head.to(tl.int64) * k_head
    V += begin.to(tl.int64) * v_token + key_head.to(tl.int64) * v_head
    DY += begin.to(tl.int64) * dy_token + head.to(tl.int64) * dy_head
    at = tl.arange(0, BM)
    rows = row + at
    inside = rows < length
    q = _rows_at(Q, row, q_token, length, D, BD, BM)
    dy = _rows_at(DY, row, dy_token, length, D, BD, BM)
    of_head = head.to(tl.int64) * tokens + first + at
    lse = tl.load(LSE + of_head, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + of_head, mask=inside, other=0.0)
    dq = tl.zeros((BM, BD), tl.float32)
    for j in range(_first_key(row, window, BN), tl.minimum(row + BM, length), BN):
        k = _rows_at(K, j, k_token, length, D, BD, BN)
        v = _rows_at(V, j, v_token, length, D, BD, BN)
        s = _scores(q, k, scale, cap)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        columns = j + tl.arange(0, BN)
        p = tl.exp2(s - lse[:, None])
        if _partly(row, row + BM - 1, j, j + BN - 1, window):
            p = tl.where(_seen(rows[:, None], columns[None, :], length, window), p, 0.0)
        ds = _ds(p, dp - delta[:, None], s, cap)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    DQ += begin.to(tl.int64) * dq_token + head.to(tl.int64) * dq_head
    _store_rows(DQ, row, dq_token, length, dq * scale, D, BD, BM)


@triton.jit
def _dkv(
    Q, K, V, DY, LSE, DELTA, DK, DV, TILES, tokens, q_token, q_head, k_token, k_head, v_token,
    v_head, dy_token, dy_head, dk_token, dk_head, dv_token, dv_head, scale,
    group: tl.constexpr, share: tl.constexpr, window: tl.constexpr, cap: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program takes `share` query heads of the group, from `first_head` on."""
    part, tile = tl.program_id(0), TILES + 3 * tl.program_id(1)
    first_head = part * share
    key_head = first_head // group
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    column, length = first - begin, end - begin
    K += begin.to(tl.int64) * k_token + key_head.to(tl.int64) * k_head
    V += begin.to(tl.int64) * v_token + key_head.to(tl.int64) * v_head
    columns = column + tl.arange(0, BN)
    k = _rows_at(K, column, k_token, length, D, BD, BN)
    v = _rows_at(V, column, v_token, length, D, BD, BN)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    low, high = column // BM * BM, length
    if window is not None:
        high = tl.minimum(length, column + BN + window - 1)
    Q += begin.to(tl.int64) * q_token + first_head.to(tl.int64) * q_head
    DY += begin.to(tl.int64) * dy_token + first_head.to(tl.int64) * dy_head
    LSE += first_head.to(tl.int64) * tokens + begin
    DELTA += first_head.to(tl.int64) * tokens + begin
    steps = tl.cdiv(high - low, BM)
    for step in range(0, share * steps):  # one query head after the other
        head = step // steps
        i = low + (step - head * steps) * BM
        at = i + tl.arange(0, BM)
        q = _rows_at(Q + head * q_head, i, q_token, length, D, BD, BM)
        dy = _rows_at(DY + head * dy_head, i, dy_token, length, D, BD, BM)
        lse = tl.load(LSE + head * tokens + at, mask=at < length, other=float("inf"))
        delta = tl.load(DELTA + head * tokens + at, mask=at < length, other=0.0)
        s = _scores(k, q, scale, cap)  # [keys, queries]: what is multiplied next
        dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
        p = tl.exp2(s - lse[None, :])
        if _partly(i, i + BM - 1, column, column + BN - 1, window):
            p = tl.where(_seen(at[None, :], columns[:, None], length, window), p, 0.0)
        ds = _ds(p, dp - delta[None, :], s, cap)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    DK += begin.to(tl.int64) * dk_token + part.to(tl.int64) * dk_head
    DV += begin.to(tl.int64) * dv_token + part.to(tl.int64) * dv_head
    _store_rows(DK, column, dk_token, length, dk * scale, D, BD, BN)
    _store_rows(DV, column, dv_token, length, dv, D, BD, BN)


@triton.jit
def _sum_parts(PARTS, Y, values, D: tl.constexpr, parts: tl.constexpr, BLOCK: tl.constexpr):
    """Y [.., D] = the sum over `parts` of PARTS [.., parts, D], one after the other."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = PARTS + at // D * (parts * D) + at % D
    y = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(parts):
        y += tl.load(source + i * D, mask=at < values, other=0.0)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=at < values)


# The largest tilings of 16-bit operands, by the size of a head, that spill no register on any GPU
# (benchmarks/static_gpu.py compiles them). sm_90 and sm_100 have products of whole warp groups
# and 227 KB of shared memory; the others share instructions, and have at least 99 KB. For fp32,
# whose products take the ordinary units, and for AMD's 64 KB tiles are smaller.
WIDE = {
    64: Tilings(Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2)),
    128: Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
    256: Tilings(Tiling(128, 32, 8, 2), Tiling(32, 32, 4, 2), Tiling(32, 32, 8, 2)),
    512: Tilings(Tiling(16, 16, 4, 1), Tiling(32, 32, 8, 1), Tiling(16, 16, 8, 1)),
}
NARROW = {
    64: Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
    128: Tilings(Tiling(128, 32, 8, 2), Tiling(64, 64, 8, 2), Tiling(64, 64, 8, 2)),
    256: Tilings(Tiling(64, 32, 8, 1), Tiling(64, 32, 8, 1), Tiling(32, 32, 8, 2)),
    512: Tilings(Tiling(16, 32, 4, 1), Tiling(16, 16, 4, 1), Tiling(16, 16, 8, 1)),
}
AMD = {
    64: Tilings(Tiling(128, 64, 8, 3), Tiling(64, 32, 4, 2), Tiling(32, 32, 4, 1)),
    128: Tilings(Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 2), Tiling(32, 32, 4, 1)),
    256: Tilings(Tiling(32, 32, 4, 1), Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1)),
    512: Tilings(Tiling(16, 16, 4, 1), Tiling(16, 16, 4, 1), Tiling(16, 16, 4, 1)),
}
FP32 = {
    64: Tilings(Tiling(32, 32, 8, 1), Tiling(32, 16, 4, 1), Tiling(16, 16, 8, 1)),
    128: Tilings(Tiling(32, 16, 4, 1), Tiling(32, 16, 4, 1), Tiling(16, 16, 8, 1)),
}


def tilings(q: Tensor) -> Tilings:
    """Return how the kernels cut their work for queries [N, Hq, D]."""
    size = next(size for size in WIDE if size >= q.shape[2])
    if q.itemsize == 4:
        return FP32[size]
    if dispatch.compiles_to() == "amdgcn":
        return AMD[size]
    capability = dispatch.capability(q.device)
    return WIDE[size] if capability in ((9, 0), (10, 0)) else NARROW[size]


def parts_of(group: int, work: int, device: torch.device) -> int:
    """Return among how many programs the query heads of a group are shared.

    A row's n tiles of keys meet 1, 2, ..., n blocks of queries of each head. So the longest program
    takes no longer than all together if heads rows (n + 1) / 2 >= multiprocessors.

    Args:
        group: query heads per key head.
        work: heads rows (n + 1).
        device: where they run.
    """
    enough = 2 * dispatch.multiprocessors(device)
    divisors = (p for p in range(1, group + 1) if group % p == 0)
    return next((p for p in divisors if p * work >= enough), group)


def flat(x: Tensor) -> Tensor:
    """Return x [B, T, H, D] as [B T, H, D], a copy unless a token's values and rows are in line."""
    if x.stride(3) != 1 or (len(x) > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        x = x.contiguous()
    return x.view(-1, *x.shape[2:])


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of tokens and of heads of [N, H, D]."""
    return [stride for x in tensors for stride in x.stride()[:2]]


class DocumentAttention(torch.autograd.Function):
    """Map q [N, Hq, D], k and v [N, Hk, D] of documents to y [N, Hq, D]; sinks are [Hq] or None."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, documents, scale, softcap, window, dense):
        (N, heads, D), group = q.shape, q.shape[1] // k.shape[1]
        ctx.documents, ctx.scale, ctx.dense = documents, scale, dense
        ctx.tilings = tilings(q)
        ctx.shape = {
            "group": group, "window": window, "cap": softcap, "D": D,
            "BD": max(16, triton.next_power_of_2(D)),
        }  # fmt: skip
        cut = ctx.tilings.forward
        y = torch.empty((N, heads, D), dtype=q.dtype, device=q.device)
        lse = torch.empty((heads, N), dtype=torch.float32, device=q.device)
        tiles = documents.tiles(cut.tile, q.device)
        dispatch.launch(
            _forward, (heads, tiles.shape[0]), q, k, v, y, lse, tiles, N, *_strides(q, k, v, y),
            scale, **ctx.shape, BM=cut.tile, BN=cut.step, num_warps=cut.warps,
            num_stages=cut.stages,
        )  # fmt: skip
        y, lse = with_sinks(y, lse, sinks, base2=True)
        ctx.save_for_backward(q, k, v, sinks, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, sinks, y, lse = ctx.saved_tensors
        (N, heads, D), on = q.shape, q.device
        dy = dy if dy.stride(2) == 1 else dy.contiguous()
        delta, dq = torch.empty_like(lse), torch.empty(q.shape, dtype=q.dtype, device=on)
        cut, given = ctx.tilings.dq, (q, k, v, dy, lse, delta)
        tiles = ctx.documents.tiles(cut.tile, on)
        rows = DELTA_VALUES // ctx.shape["BD"]
        dispatch.launch(
            _delta, (-(-N // rows), heads), y, dy, delta, N, *_strides(y, dy), D, ctx.shape["BD"],
            rows, num_warps=4,
        )  # fmt: skip
        dk, dv = DocumentAttention._of_keys(ctx, given)
        dispatch.launch(
            _dq, (heads, tiles.shape[0]), *given, dq, tiles, N, *_strides(q, k, v, dy, dq),
            ctx.scale, **ctx.shape, BM=cut.tile, BN=cut.step, num_warps=cut.warps,
            num_stages=cut.stages,
        )  # fmt: skip
        dsinks = sinks_gradient(dy, y, lse, sinks, base2=True) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, dsinks, None, None, None, None, None

    @staticmethod
    def _of_keys(ctx, given) -> Tensor:
        """Return dk and dv, [2, N, Hk, D]."""
        q, k, v, dy, *_ = given
        (N, heads, D), cut, group = k.shape, ctx.tilings.dkv, ctx.shape["group"]
        tiles = ctx.documents.tiles(cut.tile, k.device, keys=True)
        parts = 1
        if ctx.dense:
            parts = parts_of(group, heads * (len(tiles) + len(ctx.documents)), k.device)
        dtype = k.dtype if parts == 1 else torch.float32
        found = torch.empty((2, N, heads * parts, D), dtype=dtype, device=k.device)
        dispatch.launch(
            _dkv, (heads * parts, len(tiles)), *given, *found, tiles, N,
            *_strides(q, k, v, dy, *found), ctx.scale, **ctx.shape, share=group // parts,
            BM=cut.step, BN=cut.tile, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        if parts == 1:
            return found
        summed = torch.empty((2, N, heads, D), dtype=k.dtype, device=k.device)
        dispatch.launch(
            _sum_parts, (-(-summed.numel() // SUMMED),), found, summed, summed.numel(), D, parts,
            SUMMED, num_warps=SUMMED // 8 // dispatch.lanes(),
        )  # fmt: skip
        return summed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: None,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    lengths: Sequence[int] | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend within the documents of a row, or within each row, for operands that fit."""
    B, T, _, D = q.shape
    dense, lengths = lengths is None, equal_documents(B, T) if lengths is None else lengths
    documents = lengths if isinstance(lengths, Documents) else Documents(lengths)
    if window is not None and window >= documents.longest:
        window = None
    options = documents, D**-0.5 if scale is None else scale, softcap, window, dense
    return DocumentAttention.apply(*(flat(x) for x in (q, k, v)), sinks, *options).view(q.shape)
