"""The rotation on a GPU: q and k in one launch, a program per token and group of heads.

It computes in fp32. The two halves of a head are two runs of D/2 values, and every head of a
program reads its own copy of the tables, which the nearest cache serves, so that all accesses are
wide and nothing passes through shared memory. Strides are read, not forced: a view of a fused
projection is rotated without a copy. Backward is the same kernel with -sin and keeps the tables.

With the norm of the heads, y = R(w x^) for x^ = x rstd and the rotation R,

    g = w R'(dy)          dx = rstd (g - x^ mean(g x^))

where backward reads x again and computes rstd again: nothing but q and k is kept. The weights are
frozen.
"""

import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from .norms import HeadNorms

PAIRS = 8  # that a thread turns, of several heads where they are small


@triton.jit
def _heads(
    IN, X, OUT, W, in_row, in_head, x_row, x_head, out_row, out_head, head, heads, cos, sin,
    columns, inside, half, eps: tl.constexpr, offset: tl.constexpr,
    NORM: tl.constexpr, LLAMA: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    rows = head[:, None]
    mask = (rows < heads) & inside
    dtype: tl.constexpr = OUT.dtype.element_ty
    source = IN + in_row + rows * in_head + columns
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    if NORM:
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
            source = X + x_row + rows * x_head + columns
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
    if NORM and BACK:
        turned_a, turned_b = turned_a * v, turned_b * w
        share = tl.sum(turned_a * x, axis=1) + tl.sum(turned_b * z, axis=1)
        share = (share / (2 * half))[:, None]
        turned_a, turned_b = rstd * (turned_a - x * share), rstd * (turned_b - z * share)
    target = OUT + out_row + rows * out_head + columns
    tl.store(target, turned_a.to(dtype), mask=mask)
    tl.store(target + half, turned_b.to(dtype), mask=mask)


@triton.jit
def _rotate(
    Q, K, XQ, XK, YQ, YK, WQ, WK, COS, SIN, T,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    xq_batch, xq_token, xq_head, xk_batch, xk_token, xk_head,
    yq_batch, yq_token, yq_head, yk_batch, yk_token, yk_head,
    table_batch, q_heads, k_heads, half, eps: tl.constexpr, offset: tl.constexpr,
    NORM: tl.constexpr, LLAMA: tl.constexpr, BACK: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, t = token // T, token % T
    head = tl.arange(0, HEADS).to(tl.int64)
    # the same for every head, but laid out as the heads are
    columns = tl.arange(0, BLOCK)[None, :] + tl.zeros((HEADS, 1), tl.int32)
    inside = columns < half
    table = (batch * table_batch + t) * half + columns
    cos = tl.load(COS + table, mask=inside, other=0.0)
    sin = tl.load(SIN + table, mask=inside, other=0.0)
    if BACK:
        sin = -sin
    q_groups = tl.cdiv(q_heads, HEADS)
    if group < q_groups:
        _heads(
            Q, XQ, YQ, WQ, batch * q_batch + t * q_token, q_head,
            batch * xq_batch + t * xq_token, xq_head, batch * yq_batch + t * yq_token, yq_head,
            group * HEADS + head, q_heads, cos, sin, columns, inside, half, eps, offset,
            NORM, LLAMA, BACK,
        )  # fmt: skip
    else:
        _heads(
            K, XK, YK, WK, batch * k_batch + t * k_token, k_head,
            batch * xk_batch + t * xk_token, xk_head, batch * yk_batch + t * yk_token, yk_head,
            (group - q_groups) * HEADS + head, k_heads, cos, sin, columns, inside, half, eps,
            offset, NORM, LLAMA, BACK,
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
    if 2 * half < D and out[0].data_ptr() != q.data_ptr():  # the kernel leaves what is not turned
        for x, y in zip(pair, out, strict=True):
            y[..., 2 * half :] = x[..., 2 * half :]
    if not B * T * half:
        return
    k_heads, block = k.shape[2], 1 << (half - 1).bit_length()
    heads = max(1, PAIRS * dispatch.lanes() // block)
    before = pair if raw is None else raw
    weights, eps, offset, casting_mode = norms or (pair, 0.0, 0.0, "llama")
    tensors = *pair, *before, *out
    strides = [s for t in tensors for s in t.stride()[:3]]
    dispatch.launch(
        _rotate, (B * T, -(-q_heads // heads) + -(-k_heads // heads)), *tensors, *weights, cos, sin,
        T, *strides, 0 if cos.shape[0] == 1 else T, q_heads, k_heads, half, eps, offset,
        norms is not None, casting_mode == "llama", back, heads, block, num_warps=1,
    )  # fmt: skip
