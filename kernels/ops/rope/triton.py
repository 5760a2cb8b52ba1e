"""The rotation on a GPU: q and k in one launch, a program per token and group of heads.

It computes in fp32. The two halves of a head are two runs of D/2 values, and every head of a
program reads its own copy of the tables, which the nearest cache serves, so that all accesses are
wide and nothing passes through shared memory. Tokens are rows, in which the heads lie side by side;
rows may lie apart: a view of a fused projection is rotated without a copy. Backward is the same
kernel with -sin and keeps the tables.

With the norm of the heads, y = R(w x^) for x^ = x rstd and the rotation R,

    g = w R'(dy)          dx = rstd (g - x^ mean(g x^))

where backward reads x again and computes rstd again: nothing but q and k is kept. The weights are
frozen.
"""

import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch, pretend
from .norms import HeadNorms

PAIRS = 8  # that a thread turns, of several heads where they are small


@triton.jit
def _heads(
    IN, X, OUT, W, head, heads, cos, sin, columns, inside, half, D: tl.constexpr,
    NORM: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Turn heads of the rows that begin at IN, X and OUT."""
    mask = (head[:, None] < heads) & inside
    at = head[:, None] * D + columns
    dtype: tl.constexpr = OUT.dtype.element_ty
    source = IN + at
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    if NORM is not None:
        eps: tl.constexpr = NORM[0]
        offset: tl.constexpr = NORM[1]
        LLAMA: tl.constexpr = NORM[2]
        v = tl.load(W + columns, mask=inside, other=0.0)
        w = tl.load(W + half + columns, mask=inside, other=0.0)
        if offset != 0 and LLAMA:
            v = (v.to(tl.float32) + offset).to(W.dtype.element_ty)
            w = (w.to(tl.float32) + offset).to(W.dtype.element_ty)
        v, w = v.to(tl.float32), w.to(tl.float32)
        if offset != 0 and not LLAMA:
            v, w = v + offset, w + offset
        x, z = a, b
        if BACK:
            source = X + at
            x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            z = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
        mean = (tl.sum(x * x, axis=1) + tl.sum(z * z, axis=1)) / (2 * half)
        rstd = tl.rsqrt(mean + eps)[:, None]
        x, z = x * rstd, z * rstd
        if not BACK:
            if LLAMA:  # rounded before the weight and after
                x, z = x.to(dtype).to(tl.float32), z.to(dtype).to(tl.float32)
            a, b = (x * v).to(dtype).to(tl.float32), (z * w).to(dtype).to(tl.float32)
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    if NORM is not None and BACK:
        turned_a, turned_b = turned_a * v, turned_b * w
        share = tl.sum(turned_a * x, axis=1) + tl.sum(turned_b * z, axis=1)
        share = (share / (2 * half))[:, None]
        turned_a, turned_b = rstd * (turned_a - x * share), rstd * (turned_b - z * share)
    target = OUT + at
    tl.store(target, turned_a.to(dtype), mask=mask)
    tl.store(target + half, turned_b.to(dtype), mask=mask)


@triton.jit
def _rotate(
    Q, K, XQ, XK, YQ, YK, WQ, WK, COS, SIN, table_rows,
    q_row, k_row, xq_row, xk_row, yq_row, yk_row, q_heads, k_heads, half, D: tl.constexpr,
    NORM: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """NORM is (eps, offset, whether it is Llama's), or None. W and X are for the norm alone."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.arange(0, HEADS)
    # the same for every head, but laid out as the heads are
    columns = tl.arange(0, BLOCK)[None, :] + tl.zeros((HEADS, 1), tl.int32)
    inside = columns < half
    table = token % table_rows * half + columns
    cos = tl.load(COS + table, mask=inside, other=0.0)
    sin = tl.load(SIN + table, mask=inside, other=0.0)
    if BACK:
        sin = -sin
    q_groups = tl.cdiv(q_heads, HEADS)
    if group < q_groups:
        _heads(
            Q + token * q_row, XQ + token * xq_row, YQ + token * yq_row, WQ, group * HEADS + head,
            q_heads, cos, sin, columns, inside, half, D, NORM, BACK,
        )  # fmt: skip
    else:
        _heads(
            K + token * k_row, XK + token * xk_row, YK + token * yk_row, WK,
            (group - q_groups) * HEADS + head, k_heads, cos, sin, columns, inside, half, D, NORM,
            BACK,
        )  # fmt: skip


def head_norms(
    q_weight: Tensor, k_weight: Tensor, eps: float, offset: float, casting_mode: str
) -> HeadNorms:
    """Return the norms as the kernel takes them."""
    return HeadNorms((q_weight.contiguous(), k_weight.contiguous()), eps, offset, casting_mode)


def rotate(
    pair: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, *,
    back: bool, norms: HeadNorms | None = None, raw: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write q and k of `pair`, turned, to `out`, which may be the pair itself.

    norms: normalize the heads first. back: turn the other way, and undo the norm as backward does,
    for which `raw` is q and k before the norm.
    """
    q, k = pair
    B, T, q_heads, D = q.shape
    half = cos.shape[-1]
    in_place = pretend.same_memory(out[0], q)
    if 2 * half < D and not in_place:  # the kernel leaves what is not turned
        for x, y in zip(pair, out, strict=True):
            y[..., 2 * half :] = x[..., 2 * half :]
    if not B * T * half:
        return
    q_in, q_row = _tokens_as_rows(q)
    k_in, k_row = _tokens_as_rows(k)
    k_heads, block = k.shape[2], 1 << (half - 1).bit_length()
    xq, xq_row, xk, xk_row = q_in, q_row, k_in, k_row
    if raw is not None:
        (xq, xq_row), (xk, xk_row) = _tokens_as_rows(raw[0]), _tokens_as_rows(raw[1])
    yq, yq_row, yk, yk_row = q_in, q_row, k_in, k_row
    if not in_place:
        (yq, yk), yq_row, yk_row = out, q_heads * D, k_heads * D
    weights, of_norm = pair, None
    if norms is not None:
        weights, of_norm = norms.weights, (norms.eps, norms.offset, norms.casting_mode == "llama")
    heads = max(1, PAIRS * dispatch.lanes() // block)
    dispatch.launch(
        _rotate, (B * T, -(-q_heads // heads) + -(-k_heads // heads)), q_in, k_in, xq, xk, yq, yk,
        *weights, cos, sin, cos.shape[0] * T, q_row, k_row, xq_row, xk_row, yq_row, yk_row,
        q_heads, k_heads, half, D, of_norm, back, heads, block, num_warps=1,
    )  # fmt: skip
    if in_place and (q_in is not q or k_in is not k):
        for y, written in zip(out, (q_in, k_in), strict=True):
            y.copy_(written)


def _tokens_as_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return x [B, T, H, D] with the heads of a token side by side, and how far tokens lie apart.

    That is so of projections, and of gradients from attention; others are copied.
    """
    (B, T, H, D), (batch, token, head, _) = x.shape, x.stride()
    row = token if T > 1 else batch
    if (H > 1 and head != D) or (B > 1 and batch != T * row):
        return x.contiguous(), H * D
    return x, row
