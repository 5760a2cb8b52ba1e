"""The rotation on a GPU: q and k in one launch, a program per token and group of heads.

It computes in fp32. The two halves of a head are two runs of D/2 values, so that accesses are wide.
Strides are read, not forced: a view of a fused projection is rotated without a copy. The derivative
of a rotation is the rotation back, the same kernel with -sin: nothing but the tables is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 256  # that one program turns, of several heads where they are small


@triton.jit
def _turn(X, Y, x_row, x_head, y_row, head, heads, cos, sin, columns, inside, half):
    rows = head[:, None]
    mask = (rows < heads) & inside[None, :]
    source = X + x_row + rows * x_head + columns[None, :]
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    target = Y + y_row + rows * (2 * half) + columns[None, :]
    tl.store(target, (a * cos - b * sin).to(Y.dtype.element_ty), mask=mask)
    tl.store(target + half, (b * cos + a * sin).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    Q, K, YQ, YK, COS, SIN, T, q_batch, q_token, q_head, k_batch, k_token, k_head, table_batch,
    q_heads, k_heads, half,
    BACK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, t = token // T, token % T
    columns = tl.arange(0, BLOCK)
    inside = columns < half
    table = (batch * table_batch + t) * half + columns
    cos = tl.load(COS + table, mask=inside, other=0.0)[None, :]
    sin = tl.load(SIN + table, mask=inside, other=0.0)[None, :]
    if BACK:
        sin = -sin
    q_groups = tl.cdiv(q_heads, HEADS)
    if group < q_groups:
        head = (group * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        row = batch * q_batch + t * q_token
        out = token * q_heads * 2 * half
        _turn(Q, YQ, row, q_head, out, head, q_heads, cos, sin, columns, inside, half)
    else:
        head = ((group - q_groups) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        row = batch * k_batch + t * k_token
        out = token * k_heads * 2 * half
        _turn(K, YK, row, k_head, out, head, k_heads, cos, sin, columns, inside, half)


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, T, q_heads, D = q.shape
    k_heads, half = k.shape[2], D // 2
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    # one table for all rows of the batch, or one per row
    table_batch = 0 if cos.shape[0] == 1 else T
    block = triton.next_power_of_2(half)
    heads = max(1, PAIRS // block)
    grid = (B * T, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))
    if B * T:
        _rotate[grid](
            q, k, *out, cos.contiguous(), sin.contiguous(), T, *q.stride()[:3], *k.stride()[:3],
            table_batch, q_heads, k_heads, half, back, heads, block, num_warps=1,
        )  # fmt: skip
    return tuple(out)


class Rotate(torch.autograd.Function):
    """q [B, T, Hq, D], k [B, T, Hk, D], cos and sin fp32 [B or 1, T, D/2] -> q, k turned"""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _launch(q, k, cos, sin, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q, grad_k):
        return *_launch(grad_q, grad_k, *ctx.saved_tensors, back=True), None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return Rotate.apply(q, k, cos, sin)
