"""The rotation in plain torch."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)  # [B, T, H, D/2] each
    cos, sin = cos[:, :, None], sin[:, :, None]  # one table for all heads
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
