"""Root mean square normalization (arXiv:1910.07467), per row:

    y = (offset + w) x / sqrt(mean(x^2) + eps)

The statistics are fp32 whatever x is. Two orders of rounding are in use, and models trained with
one differ from the other in the last bit of bf16:

    "llama"    the normalized row is rounded to x's dtype, then multiplied by w in that dtype
    "gemma"    the product is taken in fp32 and rounded once; Gemma also stores w with offset 1
"""

from types import ModuleType

import torch
from torch import Tensor

from ... import dispatch
from . import cpu, reference

WIDEST = 32768  # row of the Triton kernel, which beyond would spill registers


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:
    """x [..., H] normalized over its last dimension and scaled by weight [H]: [..., H] in x's
    dtype. casting_mode: "llama" or "gemma", see above; ValueError for another.
    """
    check_casting_mode(casting_mode)
    backend = _backend(x, weight)
    if backend is reference:
        return reference.rms_norm(x, weight, eps, weight_offset, casting_mode)
    with dispatch.on_device(x):
        return RMSNorm.apply(x, weight, eps, weight_offset, casting_mode, backend)


def check_casting_mode(casting_mode: str) -> None:
    """Raises ValueError unless it is one of the two."""
    if casting_mode not in ("llama", "gemma"):
        raise ValueError(f"casting_mode is {casting_mode!r}: choose llama or gemma")


def _backend(x: Tensor, weight: Tensor) -> ModuleType:
    if x.dtype not in dispatch.FLOATS or weight.shape != x.shape[-1:]:
        return reference
    picked = dispatch.pick(x.device, "cpu", "triton")
    if picked == "triton" and x.shape[-1] <= WIDEST:
        from . import triton

        return triton
    return cpu if picked == "cpu" and cpu.fits(x, weight) else reference


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, Tensor]:
    """The sum s = x + residual [..., H], rounded to x's dtype, normalized as by `rms_norm`, and s
    itself: both [..., H].
    """
    check_casting_mode(casting_mode)
    same = (x.dtype, x.shape) == (residual.dtype, residual.shape)
    backend = _backend(x, weight) if same else reference
    if backend is reference:
        total = x + residual
        return reference.rms_norm(total, weight, eps, weight_offset, casting_mode), total
    options = eps, weight_offset, casting_mode, backend
    with dispatch.on_device(x):
        return AddRMSNorm.apply(x, residual, weight, *options)


def _rows(x: Tensor) -> Tensor:
    """[..., H] -> [rows, H] whose rows may lie apart."""
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return flat if flat.stride(1) == 1 else flat.contiguous()


def scale_of(weight: Tensor, offset: float, casting_mode: str) -> tuple[Tensor, float]:
    """weight and offset as the kernels take them: for "llama" their sum is one of the dtype."""
    if casting_mode == "llama" and offset != 0:
        weight, offset = weight + offset, 0.0
    return weight.contiguous(), offset


def _normalize(ctx, x, residual, weight, eps, offset, casting_mode, backend) -> tuple:
    """The normalized rows, and the sum x + residual or x."""
    weight, offset = scale_of(weight, offset, casting_mode)
    llama = casting_mode == "llama"
    y, total, rstd = backend.normalize(x, residual, weight, eps, offset, llama)
    ctx.save_for_backward(total, weight, rstd)
    ctx.offset, ctx.backend = offset, backend
    return y, total


class RMSNorm(torch.autograd.Function):
    """x [..., H], weight [H] -> [..., H]; views as rows are made here, where autograd sees none"""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, casting_mode, backend):
        y, _ = _normalize(ctx, _rows(x), None, weight, eps, offset, casting_mode, backend)
        return y.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        options = ctx.offset, ctx.needs_input_grad[1]
        rows = _rows(grad.contiguous())
        dx, dw = ctx.backend.gradients(rows, None, *ctx.saved_tensors, *options)
        return dx.view(grad.shape), dw, *(None,) * 4


class AddRMSNorm(torch.autograd.Function):
    """x, residual [..., H], weight [H] -> the sum normalized, and the sum, [..., H]"""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, casting_mode, backend):
        rows = _rows(x), _rows(residual)
        y, total = _normalize(ctx, *rows, weight, eps, offset, casting_mode, backend)
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        rows = (_rows(g.contiguous()) for g in grads)
        options = ctx.offset, ctx.needs_input_grad[2]
        dx, dw = ctx.backend.gradients(*rows, *ctx.saved_tensors, *options)
        dx = dx.view(grads[0].shape)
        return dx, dx, dw, *(None,) * 4
