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


def weight_gradient(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    lengths: Sequence[int],
    dy: Tensor,
) -> Tensor:
    """Return the gradient of the weight [C, K] in its dtype, for backends that have only x's."""
    parts = zip(x.split(list(lengths), dim=1), dy.split(list(lengths), dim=1), strict=True)
    found = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    for part, grad in parts:
        rows, T = _with_past(part, weight, state), part.shape[1]
        total = _sums(rows, weight)
        sigmoid = total.sigmoid()
        slopes = grad * sigmoid * (1 + total * (1 - sigmoid))
        for j in range(weight.shape[1]):
            found[:, j] += (slopes * rows[:, j : j + T]).sum((0, 1))
    return found.to(weight.dtype)


def _with_past(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    """Return the K - 1 inputs before x, and x: [B, K-1+T, C] in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        return F.pad(x.to(wide), (0, 0, weight.shape[1] - 1, 0))
    return torch.cat([state.detach().to(wide), x.to(wide)], dim=1)


def _sums(rows: Tensor, weight: Tensor) -> Tensor:
    K, w = weight.shape[1], weight.to(rows.dtype)
    T = rows.shape[1] - K + 1
    return sum((rows[:, j : j + T] * w[:, j] for j in range(K)), torch.zeros_like(rows[:, :T]))


def _row(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    return F.silu(_sums(_with_past(x, weight, state), weight)).to(x.dtype)
