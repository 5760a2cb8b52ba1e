"""RMSNorm on a GPU: one program per row, the row in registers, read once and written once.

Forward keeps 1 / sqrt(mean(x^2) + eps) per row, fp32. With g = dy (offset + w) and x^ = x rstd,

    dx = rstd (g - x^ mean(g x^))          dw = sum over rows of dy x^

A frozen weight, as in LoRA, takes no dw: then a program has one row, and forward and backward move
2 and 3 times the size of x. Otherwise a few hundred programs walk over the rows, each with a sum of
its own, and torch adds those up: no atomics, so the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # that share the rows when dw is wanted


@triton.jit
def _forward(
    X, W, Y, RSTD, stride, width,
    eps: tl.constexpr, offset: tl.constexpr, LLAMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W + columns, mask=inside, other=0.0)
    rstd = 1 / tl.sqrt(tl.sum(x * x) / width + eps)
    y = x * rstd
    if LLAMA:  # the normalized row rounded first
        y = y.to(X.dtype.element_ty).to(tl.float32)
        if offset != 0:
            w = (w.to(tl.float32) + offset).to(W.dtype.element_ty)
        y = y * w.to(tl.float32)
    else:
        y = y * (w.to(tl.float32) + offset)
    tl.store(RSTD + row, rstd)
    tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _row_backward(DY, X, w, RSTD, DX, stride, row, width, columns, inside):
    """Stores dx of one row and returns its share of dw."""
    x = tl.load(X + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(RSTD + row)
    normal = x * rstd
    g = dy * w
    dx = rstd * (g - normal * (tl.sum(g * normal) / width))
    tl.store(DX + row * width + columns, dx.to(DX.dtype.element_ty), mask=inside)
    return dy * normal


@triton.jit
def _backward(
    DY, X, W, RSTD, DX, DW, stride, rows, width,
    offset: tl.constexpr, NEED_DW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    w = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32) + offset
    if NEED_DW:
        dw = tl.zeros((BLOCK,), tl.float32)
        for row in range(first, rows, tl.num_programs(0)):
            dw += _row_backward(DY, X, w, RSTD, DX, stride, row, width, columns, inside)
        tl.store(DW + first * width + columns, dw, mask=inside)
    else:
        _row_backward(DY, X, w, RSTD, DX, stride, first, width, columns, inside)


def _shape(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


class RMSNorm(torch.autograd.Function):
    """x [..., H], weight [H] -> [..., H]"""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, casting_mode):
        flat = x.reshape(-1, x.shape[-1])
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        rows, width = flat.shape
        weight = weight.contiguous()
        y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        if rows:
            llama = casting_mode == "llama"
            _forward[(rows,)](
                flat, weight, y, rstd, flat.stride(0), width, eps, offset, llama, **_shape(width)
            )
        ctx.save_for_backward(flat, weight, rstd)
        ctx.offset, ctx.shape = offset, x.shape
        return y.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        rows, width = x.shape
        grad = grad.reshape(rows, width).contiguous()
        dx = torch.empty_like(grad)
        need_dw = ctx.needs_input_grad[1]
        programs = min(PROGRAMS, rows) if need_dw else rows
        dw = torch.empty((programs if need_dw else 0, width), device=x.device, dtype=torch.float32)
        if rows:
            _backward[(programs,)](
                grad, x, weight, rstd, dx, dw, x.stride(0), rows, width, ctx.offset, need_dw,
                **_shape(width),
            )  # fmt: skip
        dw = dw.sum(0).to(weight.dtype) if need_dw else None
        return dx.view(ctx.shape), dw, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str) -> Tensor:
    return RMSNorm.apply(x, weight, eps, offset, casting_mode)
