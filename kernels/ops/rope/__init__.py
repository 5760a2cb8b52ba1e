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

from types import ModuleType

import torch
from torch import Tensor

from ... import dispatch
from ..rms_norm import check_casting_mode, rms_norm
from . import cpu, reference

WIDEST = 1024  # head of the Triton kernel, and of both that normalize


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q [B, T, Hq, D] and k [B, T, Hk, D] by tables cos, sin [B or 1, T, R/2], R <= D: the
    same shapes and dtypes.

    inplace: q and k are given up, and the result may be written over them. What autograd kept of
    them for another operation's backward then raises there.
    """
    backend = _backend(q, k, cos, sin)
    if backend is reference:
        return reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
    with dispatch.on_device(q):
        return backend.rotate(q, k, cos, sin, inplace and _own_memory(q, k))


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
    backend = _backend(q, k, cos, sin) if frozen and whole else reference
    if backend is cpu and (D > WIDEST or not q.dtype == q_weight.dtype == k_weight.dtype):
        backend = reference
    if backend is not reference:
        with dispatch.on_device(q):
            return backend.norm_rotate(
                q, k, q_weight, k_weight, cos, sin, eps, weight_offset, casting_mode
            )
    options = {"weight_offset": weight_offset, "casting_mode": casting_mode}
    q, k = rms_norm(q, q_weight, eps, **options), rms_norm(k, k_weight, eps, **options)
    return rope(q, k, cos, sin)


def _own_memory(q: Tensor, k: Tensor) -> bool:
    """Whether rows are dense, and no value of q and k is another one too, as `expand` makes them
    (k being q itself among it).
    """
    return q.data_ptr() != k.data_ptr() and all(
        x.stride(-1) == 1 and all(n == 1 or s for n, s in zip(x.shape, x.stride(), strict=True))
        for x in (q, k)
    )


def _backend(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> ModuleType:
    B, T, _, D = q.shape
    fits = cos.shape == sin.shape and cos.shape[:2] in ((1, T), (B, T))
    fits &= cos.dim() == 3 and 2 * cos.shape[-1] <= D
    fits &= cos.dtype == sin.dtype == torch.float32
    fits &= (k.shape[:2], k.shape[3], k.dtype) == ((B, T), D, q.dtype)
    if not fits or q.dtype not in dispatch.FLOATS:
        return reference
    picked = dispatch.pick(q.device, "cpu", "triton")
    if picked == "triton" and D <= WIDEST:
        from . import triton

        return triton
    return cpu if picked == "cpu" and cpu.fits(q) else reference
