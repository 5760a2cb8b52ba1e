"""The kernels of cpu.cpp: fp32 and bf16, in host memory."""

import ctypes

import torch
from torch import Tensor

from ..dispatch import CPU_DTYPES, FLOAT, INT64, POINTER, address, run

PIECES = 32  # of the rows when dw is wanted, whose sums are added at the end


class Norm(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "residual", "w", "total", "y", "rstd")),
        *((name, INT64) for name in ("stride", "residual_stride", "rows", "H", "llama")),
        *((name, FLOAT) for name in ("eps", "offset")),
    )


class Gradient(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *((name, POINTER) for name in ("dy", "dtotal", "x", "w", "rstd", "dx", "dw")),
        *((name, INT64) for name in ("stride", "rows", "H", "pieces")),
        ("offset", FLOAT),
    )


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take them."""
    return x.dtype in CPU_DTYPES and weight.dtype == x.dtype and weight.shape == x.shape[-1:]


def _rows(x: Tensor) -> Tensor:
    """[..., H] -> [rows, H] whose rows may lie apart."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _normalize(ctx, x, residual, weight, eps, offset, casting_mode) -> tuple[Tensor, Tensor]:
    """Of x [rows, H], or of the sum x + residual: the normalized rows and the sum (or x)."""
    llama = casting_mode == "llama"
    if llama and offset != 0:  # rounded to the weight's dtype
        weight, offset = weight + offset, 0.0
    weight = weight.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    total = x if residual is None else torch.empty_like(y)
    rstd = torch.empty(len(x), dtype=torch.float32)
    pointers = [address(t) for t in (x, residual, weight, total, y, rstd)]
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    run("rms_norm", x.dtype, Norm(*pointers, *strides, *x.shape, llama, eps, offset))
    ctx.save_for_backward(total, weight, rstd)
    ctx.offset = offset
    return y, total


def _gradients(ctx, grad, grad_total, need_dw) -> tuple[Tensor, Tensor | None]:
    """dx, to which the gradient of the sum is added if there is one, and dw if it is needed."""
    x, weight, rstd = ctx.saved_tensors
    grad = grad.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    dx, pieces = torch.empty_like(grad), min(PIECES, len(x))
    dw = torch.empty((pieces, x.shape[1]), dtype=torch.float32) if need_dw else None
    pointers = [address(t) for t in (grad, grad_total, x, weight, rstd, dx, dw)]
    arguments = Gradient(*pointers, x.stride(0), *x.shape, pieces, ctx.offset)
    run("rms_norm_backward", x.dtype, arguments)
    return dx, dw.sum(0).to(weight.dtype) if need_dw else None


class RMSNorm(torch.autograd.Function):
    """x [rows, H], weight [H] -> [rows, H]"""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, casting_mode):
        return _normalize(ctx, x, None, weight, eps, offset, casting_mode)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *_gradients(ctx, grad, None, ctx.needs_input_grad[1]), None, None, None


class AddRMSNorm(torch.autograd.Function):
    """x, residual [rows, H], weight [H] -> the sum normalized, and the sum, [rows, H]"""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, casting_mode):
        return _normalize(ctx, x, residual, weight, eps, offset, casting_mode)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_total):
        dx, dw = _gradients(ctx, grad, grad_total, ctx.needs_input_grad[2])
        return dx, dx, dw, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str) -> Tensor:
    return RMSNorm.apply(_rows(x), weight, eps, offset, casting_mode).view(x.shape)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str
) -> tuple[Tensor, Tensor]:
    y, total = AddRMSNorm.apply(_rows(x), _rows(residual), weight, eps, offset, casting_mode)
    return y.view(x.shape), total.view(x.shape)
