"""Muon in plain torch, one matrix at a time."""

import torch
from torch import Tensor

from ... import pretend
from ..adamw.remainder import joined, put

STEPS = 5
QUINTIC = 3.4445, -4.7750, 2.0315
"""a, b' and c of the module, which Jordan et al. 2024 tuned for the steepest slope at 0."""
LEAST = 1e-7
"""The smallest norm that a matrix is divided by."""
RMS = 0.2
"""The root mean square of AdamW's steps, in learning rates (arXiv:2502.16982, section 2.2)."""


def muon_step(
    p: Tensor,
    grad: Tensor,
    mean: Tensor,
    remainder: Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Update a matrix p [M, N], its running mean and its remainder in place."""
    grad = grad.to(mean.dtype)
    mean.lerp_(grad, 1 - momentum)
    moved = orthogonalized(grad.lerp(mean, momentum))
    rate = lr * RMS * max(p.shape) ** 0.5
    x = p if remainder is None else joined(p, remainder)
    x.mul_(1 - lr * weight_decay).add_(moved.to(x.dtype), alpha=-rate)
    if remainder is not None:
        put(x, p, remainder)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return a matrix [M, N] with its singular values near 1; in bf16 on a GPU."""
    if pretend.kind_of(matrix.device) != "cpu":
        matrix = matrix.bfloat16()
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / torch.linalg.vector_norm(x).clamp(min=LEAST)
    for _ in range(STEPS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x
