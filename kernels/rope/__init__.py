"""Rotary position embedding (arXiv:2104.09864), in the half-split layout of the checkpoints.

A head of D values is D/2 pairs (x_j, x_{j + D/2}); position t turns pair j by the angle t * f_j:

    x_j'       = x_j cos(t f_j) - x_{j+D/2} sin(t f_j)
    x_{j+D/2}' = x_{j+D/2} cos(t f_j) + x_j sin(t f_j)

The tables hold the D/2 distinct angles, in fp32; the rotation is computed in fp32 and rounded once.
"""

import torch
from torch import Tensor

from .. import dispatch
from . import reference


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q [B, T, Hq, D] and k [B, T, Hk, D] by tables cos, sin [B or 1, T, D/2]: the same
    shapes and dtypes.
    """
    B, T, _, D = q.shape
    fits = cos.shape == sin.shape and cos.shape in ((1, T, D // 2), (B, T, D // 2))
    fits &= cos.dtype == sin.dtype == torch.float32
    if fits and k.shape[:2] == (B, T) and k.shape[3] == D and dispatch.triton_runs(q):
        from . import triton

        with dispatch.on_device(q):
            return triton.rotate(q, k, cos, sin)
    return reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
