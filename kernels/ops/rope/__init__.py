"""Rotary position embedding (arXiv:2104.09864), in the half-split layout of published models.

A head of D values is D/2 pairs (x_j, x_{j + D/2}); position t turns pair j by the angle t * f_j:

    x_j'       = x_j cos(t f_j) - x_{j+D/2} sin(t f_j)
    x_{j+D/2}' = x_{j+D/2} cos(t f_j) + x_j sin(t f_j)

The tables hold the D/2 distinct angles, in fp32, a row for every position: each packed document
starts again at 0 in them. The rotation is computed in fp32 and rounded once. With tables for R < D
values the first R of a head are turned and the others stay (partial rotation). The derivative is
the rotation back.

Some families normalize every head of q and k before they turn it (Qwen 3, Gemma 3). `norm_rope`
does both in one pass; of its operands it keeps q and k.
"""

from types import ModuleType

import torch
from torch import Tensor

from ... import dispatch, pretend
from ...autograd import once_differentiable
from ..rms_norm import check_casting_mode, rms_norm
from . import cpu, reference
from .norms import HeadNorms

WIDEST = 1024  # head of the Triton kernel, and of both kernels that normalize


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate the heads of q and k by the angles of their positions (arXiv:2104.09864).

    Differentiable in q and k; it keeps the tables for backward.

    Args:
        q: [B, T, Hq, D], any floating-point dtype; kernels run for fp32, bf16 and fp16.
        k: [B, T, Hk, D] in q's dtype.
        cos: the cosines of the angles, fp32 [B or 1, T, R/2] with R <= D. The first R values of a
            head are turned.
        sin: the sines, in the shape of `cos`.
        inplace: whether q and k are given up, so that the result may be written over them. If
            autograd kept them for another operation's backward, that backward raises an error.

    Returns:
        q and k turned, in their shapes and dtypes.
    """
    if dispatch.traces():
        return dispatch.traced().rope(q, k, cos, sin)
    backend = _backend(q, k, cos, sin)
    if backend is reference:
        return reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
    return Rotate.apply(q, k, cos, sin, (inplace and _own_memory(q, k), backend))


def norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    weight_offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, Tensor]:
    """Normalize every head of q and k as `rms_norm` does, then rotate it as `rope` does.

    Differentiable in q and k, and in the weights. Where both weights are frozen and the whole head
    is turned, one kernel does both steps.

    Args:
        q: [B, T, Hq, D], any floating-point dtype; kernels run for fp32, bf16 and fp16.
        k: [B, T, Hk, D] in q's dtype.
        q_weight: the weight of the norm of q's heads [D].
        k_weight: the weight of the norm of k's heads [D].
        eps: what is added to the mean of the squares.
        cos: fp32 [B or 1, T, R/2], as in `rope`.
        sin: fp32 [B or 1, T, R/2], as in `rope`.
        weight_offset: what is added to the weights, 1 for Gemma.
        casting_mode: "llama" or "gemma", as in `rms_norm`.

    Returns:
        q and k normalized and turned, in their shapes and dtypes.

    Raises:
        ValueError: `casting_mode` is another word.
    """
    check_casting_mode(casting_mode)
    if dispatch.traces():
        given = q, k, q_weight, k_weight, eps, cos, sin, weight_offset, casting_mode
        return dispatch.traced().norm_rope(*given)
    D = q.shape[-1]
    frozen = not (torch.is_grad_enabled() and (q_weight.requires_grad or k_weight.requires_grad))
    whole = 2 * cos.shape[-1] == D and q_weight.shape == k_weight.shape == (D,)
    backend = _backend(q, k, cos, sin) if frozen and whole else reference
    if backend is cpu and (D > WIDEST or not q.dtype == q_weight.dtype == k_weight.dtype):
        backend = reference
    if backend is not reference:
        norms = backend.head_norms(q_weight, k_weight, eps, weight_offset, casting_mode)
        return NormRotate.apply(q, k, cos, sin, norms, backend)
    q = rms_norm(q, q_weight, eps, weight_offset=weight_offset, casting_mode=casting_mode)
    k = rms_norm(k, k_weight, eps, weight_offset=weight_offset, casting_mode=casting_mode)
    return rope(q, k, cos, sin)


class Rotate(torch.autograd.Function):
    """Turn q [B, T, Hq, D] and k [B, T, Hk, D] by cos and sin fp32 [B or 1, T, R/2]."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, options):
        inplace, backend = options
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.backend = backend
        if inplace:
            out = q.detach(), k.detach()
            backend.rotate((q, k), out, cos, sin, back=False)
            torch.autograd.graph.increment_version((q, k))
            return out
        pair = _dense_rows(q, k)
        out = _empty_like(*pair)
        backend.rotate(pair, out, cos, sin, back=False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        pair = _dense_rows(*grads)
        out = _empty_like(*pair)
        ctx.backend.rotate(pair, out, *ctx.saved_tensors, back=True)
        return *out, None, None, None


class NormRotate(torch.autograd.Function):
    """Normalize the heads of q and k by frozen weights, and turn them as `Rotate` does."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, norms, backend):
        cos, sin = cos.contiguous(), sin.contiguous()
        pair = _dense_rows(q, k)
        ctx.save_for_backward(*pair, cos, sin, *norms.weights)
        ctx.options, ctx.backend = norms[1:], backend
        out = _empty_like(*pair)
        backend.rotate(pair, out, cos, sin, back=False, norms=norms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        q, k, cos, sin, *weights = ctx.saved_tensors
        pair = _dense_rows(*grads)
        out, norms = _empty_like(*pair), HeadNorms(tuple(weights), *ctx.options)
        ctx.backend.rotate(pair, out, cos, sin, back=True, norms=norms, raw=(q, k))
        return *out, *(None,) * 4


def _backend(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> ModuleType:
    B, T, _, D = q.shape
    takes = cos.shape == sin.shape and cos.shape[:2] in ((1, T), (B, T))
    takes &= cos.dim() == 3 and 2 * cos.shape[-1] <= D
    takes &= cos.dtype == sin.dtype == torch.float32
    takes &= (k.shape[:2], k.shape[3], k.dtype) == ((B, T), D, q.dtype)
    narrow = takes and q.dtype in dispatch.FLOATS and D <= WIDEST
    return dispatch.backend(__package__, q.device, cpu=takes and cpu.fits(q), triton=narrow)


def _own_memory(q: Tensor, k: Tensor) -> bool:
    """Return whether rows are dense, and no value of q and k is another value of them too.

    Some are after `expand`, and where k is q itself.
    """
    apart = q.storage_offset() != k.storage_offset() or not pretend.same_memory(q, k)
    return apart and all(
        x.stride(-1) == 1 and all(n == 1 or s for n, s in zip(x.shape, x.stride(), strict=True))
        for x in (q, k)
    )


def _dense_rows(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k with the values of a head side by side."""
    return _dense_row(q), _dense_row(k)


def _dense_row(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return dense memory for the results, whatever the strides of q and k."""
    return q.new_empty(q.shape), k.new_empty(k.shape)
