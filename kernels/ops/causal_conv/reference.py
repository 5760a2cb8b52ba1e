"""The convolution in plain torch: K products of a channel's weight and the shifted row."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x: Tensor, weight: Tensor, state: Tensor | None, lengths: Sequence[int] | None
) -> Tensor:
    """Convolve x [B, T, C] by weight [C, K] and apply SiLU: [B, T, C] in x's dtype."""
    if lengths is None:
        return _row(x, weight, state)
    parts = x.split(list(lengths), dim=1)
    return torch.cat([_row(part, weight, None) for part in parts], dim=1)


def _row(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    T, K = x.shape[1], weight.shape[1]
    if state is None:
        rows = F.pad(x.to(wide), (0, 0, K - 1, 0))
    else:
        rows = torch.cat([state.detach().to(wide), x.to(wide)], dim=1)
    w = weight.to(wide)
    total = sum((rows[:, j : j + T] * w[:, j] for j in range(K)), torch.zeros_like(rows[:, :T]))
    return F.silu(total).to(x.dtype)
