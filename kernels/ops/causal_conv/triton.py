"""The convolution of a delta net on a GPU: tiles of tokens of one document, and of channels.

    s_t = sum_j w_j x_(t-K+1+j)        y = s sigmoid(s)
    ds_t = dy_t sigmoid(s_t) (1 + s_t (1 - sigmoid(s_t)))
    dx_t = sum_j w_j ds_(t+K-1-j)      dw_j = sum_t ds_t x_(t-K+1+j)

Backward keeps the inputs, and computes the sums of K tokens again for each of them: those come from
the cache, and nothing but dx is written. Each tile writes its part of dw, which are added in order,
so that the bits are the same every time. Tiles begin at their document's first token.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from ...autograd import once_differentiable
from ..attention.documents import Documents, equal_documents

TOKENS, CHANNELS = 16, 128  # of a tile
THREADS = 256


@triton.jit
def _inputs(X, STATE, at, length, columns, apart, C, K: tl.constexpr):
    """Rows `at` of a document in fp32: before it the state or zeros, from `length` on zeros."""
    inside, known = columns[None, :] < C, ((at >= 0) & (at < length))[:, None]
    source = X + at.to(tl.int64)[:, None] * apart + columns[None, :]
    x = tl.load(source, mask=known & inside, other=0.0).to(tl.float32)
    if STATE is not None:
        source = STATE + (at + (K - 1))[:, None] * C + columns[None, :]
        before = ((at < 0) & (at > -K))[:, None] & inside
        x += tl.load(source, mask=before, other=0.0).to(tl.float32)
    return x


@triton.jit
def _sums(X, W, STATE, rows, length, columns, apart, C, K: tl.constexpr):
    """Add up what the K tokens up to each of `rows` make of it."""
    s = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for j in tl.static_range(K):
        w = tl.load(W + j * C + columns, mask=columns < C, other=0.0).to(tl.float32)
        s += _inputs(X, STATE, rows - (K - 1) + j, length, columns, apart, C, K) * w[None, :]
    return s


@triton.jit
def _forward(
    X, W, STATE, Y, TILES, apart, C, K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    tile = TILES + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    start, length = begin.to(tl.int64), end - begin
    rows = first - begin + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    if STATE is not None:
        STATE += (begin // length).to(tl.int64) * (K - 1) * C
    s = _sums(X + start * apart, W, STATE, rows, length, columns, apart, C, K)
    target = Y + (start + rows)[:, None] * C + columns[None, :]
    inside = (rows < length)[:, None] & (columns < C)[None, :]
    tl.store(target, (s * tl.sigmoid(s)).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    X, W, STATE, DY, DX, DW, TILES, apart, dy_apart, C, K: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write dx, and the tile's part of dw to DW [tiles, K, C] in fp32, if they are given."""
    tile = TILES + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    start, length = begin.to(tl.int64), end - begin
    rows = first - begin + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    X += start * apart
    DY += start * dy_apart
    if STATE is not None:
        STATE += (begin // length).to(tl.int64) * (K - 1) * C
    dx = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for i in tl.static_range(K):  # what the token i later had of this one
        s = _sums(X, W, STATE, rows + i, length, columns, apart, C, K)
        sigmoid = tl.sigmoid(s)
        ds = _inputs(DY, None, rows + i, length, columns, dy_apart, C, K)
        ds *= sigmoid * (1 + s * (1 - sigmoid))
        w = tl.load(W + (K - 1 - i) * C + columns, mask=columns < C, other=0.0)
        dx += ds * w.to(tl.float32)[None, :]
        if DW is not None and i == 0:
            part = DW + tl.program_id(0).to(tl.int64) * K * C
            for j in tl.static_range(K):
                x = _inputs(X, STATE, rows - (K - 1) + j, length, columns, apart, C, K)
                tl.store(part + j * C + columns, tl.sum(ds * x, 0), mask=columns < C)
    if DX is not None:
        target = DX + (start + rows)[:, None] * C + columns[None, :]
        inside = (rows < length)[:, None] & (columns < C)[None, :]
        tl.store(target, dx.to(DX.dtype.element_ty), mask=inside)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


class CausalConvolution(torch.autograd.Function):
    """Map x [N, C] and weight [C, K] to y [N, C]; the state is [B, K-1, C] or None."""

    @staticmethod
    def forward(ctx, x, weight, state, documents):
        (N, C), K = x.shape, weight.shape[1]
        x, columns = _dense(x), weight.t().contiguous()
        y = torch.empty((N, C), dtype=x.dtype, device=x.device)
        tiles = documents.tiles(TOKENS, x.device)
        dispatch.launch(
            _forward, (len(tiles), triton.cdiv(C, CHANNELS)), x, columns, state, y, tiles,
            x.stride(0), C, K, TOKENS, CHANNELS, num_warps=THREADS // dispatch.lanes(),
        )  # fmt: skip
        ctx.save_for_backward(x, columns, state, tiles)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, columns, state, tiles), dy = ctx.saved_tensors, _dense(dy)
        (N, C), K, dx, parts = x.shape, len(columns), None, None
        if ctx.needs_input_grad[0]:
            dx = torch.empty((N, C), dtype=x.dtype, device=x.device)
        if ctx.needs_input_grad[1]:
            shape = len(tiles), K, C  # a tile of none leaves its zeros
            parts = torch.zeros(shape, dtype=torch.float32, device=x.device)
        dispatch.launch(
            _backward, (len(tiles), triton.cdiv(C, CHANNELS)), x, columns, state, dy, dx, parts,
            tiles, x.stride(0), dy.stride(0), C, K, TOKENS, CHANNELS,
            num_warps=THREADS // dispatch.lanes(),
        )  # fmt: skip
        dw = None if parts is None else parts.sum(0).t().to(columns.dtype)
        return dx, dw, None, None


def causal_conv(
    x: Tensor, weight: Tensor, state: Tensor | None, lengths: Sequence[int] | None
) -> Tensor:
    """Convolve x [B, T, C] by weight [C, K] and apply SiLU: [B, T, C] in x's dtype."""
    if lengths is None:
        lengths = equal_documents(*x.shape[:2])
    documents = lengths if isinstance(lengths, Documents) else Documents(lengths)
    state = None if state is None else state.detach().contiguous()
    return CausalConvolution.apply(x.flatten(0, 1), weight, state, documents).view(x.shape)
