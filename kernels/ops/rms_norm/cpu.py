"""Calls of the C++ kernels in cpu.cpp: fp32 and bf16, in host memory."""

import ctypes

import torch
from torch import Tensor

from ...dispatch import CPU_DTYPES, FLOAT, INT64, POINTER, address, run

PIECES = 32  # that the rows are cut into when dw is wanted; their sums are added at the end


class Norm(ctypes.Structure):
    """`Norm` of cpu.cpp: the arguments of `rms_norm`."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "residual", "w", "total", "y", "rstd")),
        *((name, INT64) for name in ("stride", "residual_stride", "rows", "H", "llama")),
        *((name, FLOAT) for name in ("eps", "offset")),
    )


class Gradient(ctypes.Structure):
    """`Gradient` of cpu.cpp: the arguments of `rms_norm_backward`."""

    _fields_ = (
        *((name, POINTER) for name in ("dy", "dtotal", "x", "w", "rstd", "dx", "dw")),
        *((name, INT64) for name in ("stride", "rows", "H", "pieces")),
        ("offset", FLOAT),
    )


def fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels take x and weight."""
    return x.dtype in CPU_DTYPES and weight.dtype == x.dtype and weight.shape == x.shape[-1:]


def normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, llama: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize x [rows, H], or x + residual: return y, the sum (or x), and rstd fp32 [rows]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
    pointers = [address(t) for t in (x, residual, weight, total, y, rstd)]
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    run("rms_norm", x.dtype, Norm(*pointers, *strides, *x.shape, llama, eps, offset))
    return y, total, rstd


def gradients(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    offset: float, need_dw: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return dx, and dw if it is needed.

    The gradient of the sum, if there is one, is added to dx.
    """
    dx, pieces = torch.empty_like(grad), min(PIECES, len(x))
    dw = None
    if need_dw:
        dw = torch.empty((pieces, x.shape[1]), dtype=torch.float32, device=x.device)
    pointers = [address(t) for t in (grad, grad_total, x, weight, rstd, dx, dw)]
    arguments = Gradient(*pointers, x.stride(0), *x.shape, pieces, offset)
    run("rms_norm_backward", x.dtype, arguments)
    return dx, None if dw is None else dw.sum(0).to(weight.dtype)
