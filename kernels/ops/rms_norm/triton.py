"""RMSNorm on a GPU: one program per row, the row in registers, read once and written once.

Forward keeps 1 / sqrt(mean(x^2) + eps) per row, fp32. With g = dy (offset + w) and x^ = x rstd,

    dx = rstd (g - x^ mean(g x^))          dw = sum over rows of dy x^

A frozen weight, as in LoRA, takes no dw: then a program has one row, and forward and backward move
2 and 3 times the size of x. Otherwise a few hundred programs walk over the rows, each with a sum of
its own, and torch adds those up: no atomics, so the same bits every time.

`add_rms_norm` takes the sum of a residual connection along: it is read where it is made, and its
gradient joins that of the norm, instead of three more passes over the activations.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch

PROGRAMS = 256  # that share the rows when dw is wanted


@triton.jit
def _forward(
    X, RESIDUAL, S, W, Y, RSTD, stride, residual_stride, y_stride, width,
    eps: tl.constexpr, offset: tl.constexpr, LLAMA: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W + columns, mask=inside, other=0.0)
    if ADD:
        at = row * residual_stride + columns
        x += tl.load(RESIDUAL + at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(S.dtype.element_ty)
        tl.store(S + row * width + columns, x, mask=inside)
        x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) / width + eps)
    y = x * rstd
    if LLAMA:  # the normalized row rounded first
        y = y.to(X.dtype.element_ty).to(tl.float32)
        y = y * w.to(tl.float32)
    else:
        y = y * (w.to(tl.float32) + offset)
    tl.store(RSTD + row, rstd)
    tl.store(Y + row * y_stride + columns, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _row_backward(DY, DS, X, w, RSTD, DX, stride, row, width, columns, inside, ADD: tl.constexpr):
    """Stores dx of one row and returns its share of dw."""
    x = tl.load(X + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(RSTD + row)
    normal = x * rstd
    g = dy * w
    dx = rstd * (g - normal * (tl.sum(g * normal) / width))
    if ADD:
        dx += tl.load(DS + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(DX + row * width + columns, dx.to(DX.dtype.element_ty), mask=inside)
    return dy * normal


@triton.jit
def _backward(
    DY, DS, X, W, RSTD, DX, DW, stride, rows, width,
    offset: tl.constexpr, NEED_DW: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    w = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32) + offset
    if NEED_DW:
        dw = tl.zeros((BLOCK,), tl.float32)
        for row in range(first, rows, tl.num_programs(0)):
            dw += _row_backward(DY, DS, X, w, RSTD, DX, stride, row, width, columns, inside, ADD)
        tl.store(DW + first * width + columns, dw, mask=inside)
    else:
        _row_backward(DY, DS, X, w, RSTD, DX, stride, first, width, columns, inside, ADD)


@functools.cache
def _launch_shape(width: int, lanes: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(512, max(lanes, block // 16)) // lanes}


def normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, llama: bool,
    room: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normalize x [rows, H], or x + residual: return y, the sum (or x), and rstd fp32 [rows].

    Each row of y has `room` values of memory beside it.
    """
    added = residual is not None
    other = residual if added else x
    rows, width = x.shape
    y = torch.empty((rows, width + room), dtype=x.dtype, device=x.device)[:, :width]
    total = torch.empty((rows, width), dtype=x.dtype, device=x.device) if added else x
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        dispatch.launch(
            _forward, (rows,), x, other, total, weight, y, rstd, x.stride(0), other.stride(0),
            y.stride(0), width, eps, offset, llama, added,
            **_launch_shape(width, dispatch.lanes()),
        )  # fmt: skip
    return y, total, rstd


def gradients(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    offset: float, need_dw: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return dx, and dw if it is needed.

    The gradient of the sum, if there is one, is added to dx.
    """
    rows, width = x.shape
    added = grad_total is not None
    of_total = grad_total if added else grad
    dx = torch.empty_like(grad)
    programs = min(PROGRAMS, rows) if need_dw else rows
    dw = torch.empty((programs if need_dw else 0, width), device=x.device, dtype=torch.float32)
    if rows:
        dispatch.launch(
            _backward, (programs,), grad, of_total, x, weight, rstd, dx, dw, x.stride(0), rows,
            width, offset, need_dw, added, **_launch_shape(width, dispatch.lanes()),
        )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype) if need_dw else None
