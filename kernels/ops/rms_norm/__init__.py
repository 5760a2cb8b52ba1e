"""Root mean square normalization of rows (arXiv:1910.07467).

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
from ...autograd import once_differentiable
from . import cpu, reference

WIDEST = 32768  # row of the Triton kernel, which beyond would spill registers


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    casting_mode: str = "llama",
    room: int = 0,
) -> Tensor:
    """Normalize rows by their root mean square, and scale them (arXiv:1910.07467).

    Differentiable in x and weight; the statistics are in fp32.

    Args:
        x: [..., H], any floating-point dtype; kernels run for fp32, bf16 and fp16.
        weight: w [H].
        eps: what is added to the mean of the squares.
        weight_offset: what is added to the weight, 1 for Gemma.
        casting_mode: "llama" rounds the normalized row to x's dtype before the product with the
            weight; "gemma" rounds the product, once.
        room: how many values of memory each row of the result has beside it, for who reads it;
            counts where Triton runs.

    Returns:
        (weight_offset + w) x / sqrt(mean(x^2) + eps), [..., H] in x's dtype.

    Raises:
        ValueError: `casting_mode` is another word.
    """
    check_casting_mode(casting_mode)
    if dispatch.traces():
        return dispatch.traced().rms_norm(x, weight, eps, weight_offset, casting_mode)
    backend = _backend(x, weight)
    if backend is reference:
        return reference.rms_norm(x, weight, eps, weight_offset, casting_mode)
    options = eps, weight_offset, casting_mode, room, backend
    if not torch.is_grad_enabled():  # backward makes the inputs of layers again
        y, *_ = _normalize(_rows(x), None, weight, options)
        return y.view(x.shape)
    return RMSNorm.apply(x, weight, options)


def check_casting_mode(casting_mode: str) -> None:
    """Raise ValueError unless `casting_mode` is one of the two."""
    if casting_mode not in ("llama", "gemma"):
        raise ValueError(f"casting_mode is {casting_mode!r}: choose llama or gemma")


def _backend(x: Tensor, weight: Tensor) -> ModuleType:
    takes = x.dtype in dispatch.FLOATS and weight.shape == x.shape[-1:]
    narrow = takes and x.shape[-1] <= WIDEST
    return dispatch.backend(__package__, x.device, cpu=cpu.fits(x, weight), triton=narrow)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    casting_mode: str = "llama",
    room: int = 0,
) -> tuple[Tensor, Tensor]:
    """Add a residual connection and normalize the sum, as `rms_norm` does.

    Differentiable in x, residual and weight. The sum s = x + residual is rounded to x's dtype
    before it is normalized. Where a kernel runs, it is read in the pass that makes it.

    Args:
        x: [..., H], any floating-point dtype; kernels run for fp32, bf16 and fp16.
        residual: the shape and dtype of x.
        weight: w [H].
        eps: what is added to the mean of the squares.
        weight_offset: what is added to the weight, 1 for Gemma.
        casting_mode: "llama" or "gemma", as in `rms_norm`.
        room: as in `rms_norm`, of the normalized sum.

    Returns:
        The normalized sum and s itself, both [..., H] in x's dtype.

    Raises:
        ValueError: `casting_mode` is another word.
    """
    check_casting_mode(casting_mode)
    if dispatch.traces():
        given = x, residual, weight, eps, weight_offset, casting_mode
        return dispatch.traced().add_rms_norm(*given)
    same = (x.dtype, x.shape) == (residual.dtype, residual.shape)
    backend = _backend(x, weight) if same else reference
    if backend is reference:
        total = x + residual
        return reference.rms_norm(total, weight, eps, weight_offset, casting_mode), total
    options = eps, weight_offset, casting_mode, room, backend
    return AddRMSNorm.apply(x, residual, weight, options)


def _rows(x: Tensor) -> Tensor:
    """View x [..., H] as [rows, H], whose rows may lie apart."""
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return flat if flat.stride(1) == 1 else flat.contiguous()


def scale_of(weight: Tensor, offset: float, casting_mode: str) -> tuple[Tensor, float]:
    """Return weight and offset as the kernels take them.

    For "llama" they are one tensor: their sum, rounded to the dtype.
    """
    if casting_mode == "llama" and offset != 0:
        weight, offset = weight + offset, 0.0
    return weight.contiguous(), offset


def _normalize(x, residual, weight, options) -> tuple:
    """Return the normalized rows, the sum x + residual or x, and what else backward needs."""
    eps, offset, casting_mode, room, backend = options
    weight, offset = scale_of(weight, offset, casting_mode)
    llama = casting_mode == "llama"
    beside = () if backend is cpu else (room,)
    y, total, rstd = backend.normalize(x, residual, weight, eps, offset, llama, *beside)
    return y, total, weight, rstd, offset


def _keep(ctx, kept, backend) -> None:
    """Keep what backward needs."""
    *tensors, ctx.offset = kept
    ctx.save_for_backward(*tensors)
    ctx.backend = backend


class RMSNorm(torch.autograd.Function):
    """Normalize x [..., H] by weight [H]: y [..., H].

    Views as rows are made in here, where autograd does not see them.
    """

    @staticmethod
    def forward(ctx, x, weight, options):
        y, *kept = _normalize(_rows(x), None, weight, options)
        _keep(ctx, kept, options[-1])
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total, weight, rstd = ctx.saved_tensors
        rows, need_dw = grad.contiguous().view(total.shape), ctx.needs_input_grad[1]
        dx, dw = ctx.backend.gradients(rows, None, total, weight, rstd, ctx.offset, need_dw)
        return dx.view(grad.shape), dw, None


class AddRMSNorm(torch.autograd.Function):
    """Add residual to x [..., H], normalize by weight [H]: the normalized sum, and the sum."""

    @staticmethod
    def forward(ctx, x, residual, weight, options):
        y, *kept = _normalize(_rows(x), _rows(residual), weight, options)
        _keep(ctx, kept, options[-1])
        total = kept[0]
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_total):
        total, weight, rstd = ctx.saved_tensors
        rows, of_total = (g.contiguous().view(total.shape) for g in (grad, grad_total))
        need_dw = ctx.needs_input_grad[2]
        dx, dw = ctx.backend.gradients(rows, of_total, total, weight, rstd, ctx.offset, need_dw)
        dx = dx.view(grad.shape)
        return dx, dx, dw, None
