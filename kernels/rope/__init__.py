"""Rotary position embedding (arXiv:2104.09864), in the half-split layout of the checkpoints.

A head of D values is D/2 pairs (x_j, x_{j + D/2}); position t turns pair j by the angle t * f_j:

    x_j'       = x_j cos(t f_j) - x_{j+D/2} sin(t f_j)
    x_{j+D/2}' = x_{j+D/2} cos(t f_j) + x_j sin(t f_j)

The tables hold the D/2 distinct angles, in fp32, a row for every position: packed documents start
anew in them. The rotation is computed in fp32 and rounded once. With tables for R < D values the
first R of a head are turned and the others stay (partial rotation). The derivative is the rotation
back.

Some families normalize every head of q and k before they turn it (Qwen 3, Gemma 3). `norm_rope`
does both in one pass; of its operands it keeps q and k.
"""

import torch
from torch import Tensor

from .. import dispatch
from ..rms_norm import check_casting_mode, rms_norm
from . import reference

WIDEST = 1024  # head of the Triton kernel


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q [B, T, Hq, D] and k [B, T, Hk, D] by tables cos, sin [B or 1, T, R/2], R <= D: the
    same shapes and dtypes.

    inplace: q and k are given up, and the result may be written over them. What autograd kept of
    them for another operation's backward then raises there.
    """
    if _suits_triton(q, k, cos, sin):
        from . import triton

        with dispatch.on_device(q):
            return triton.rotate(q, k, cos, sin, inplace)
    return reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)


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
    """`rms_norm` of every head of q and k, with weights [D], then `rope`."""
    check_casting_mode(casting_mode)
    D = q.shape[-1]
    frozen = not (torch.is_grad_enabled() and (q_weight.requires_grad or k_weight.requires_grad))
    whole = 2 * cos.shape[-1] == D and q_weight.shape == k_weight.shape == (D,)
    if frozen and whole and _suits_triton(q, k, cos, sin):
        from . import triton

        with dispatch.on_device(q):
            return triton.norm_rotate(
                q, k, q_weight, k_weight, cos, sin, eps, weight_offset, casting_mode
            )
    options = {"weight_offset": weight_offset, "casting_mode": casting_mode}
    q, k = rms_norm(q, q_weight, eps, **options), rms_norm(k, k_weight, eps, **options)
    return rope(q, k, cos, sin)


def _suits_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    B, T, _, D = q.shape
    fits = cos.shape == sin.shape and cos.shape[:2] in ((1, T), (B, T))
    fits &= cos.dim() == 3 and 2 * cos.shape[-1] <= D <= WIDEST
    fits &= cos.dtype == sin.dtype == torch.float32
    return (
        fits
        and (k.shape[:2], k.shape[3], k.dtype) == ((B, T), D, q.dtype)
        and (dispatch.triton_runs(q))
    )
