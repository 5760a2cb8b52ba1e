"""RMSNorm in plain torch."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str) -> Tensor:
    """Return (offset + weight) x / sqrt(mean(x^2) + eps) for x [..., H] and weight [H]."""
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if casting_mode == "gemma":
        return (normalized * (offset + weight.float())).to(x.dtype)
    scale = weight if offset == 0 else offset + weight
    return (scale * normalized.to(x.dtype)).to(x.dtype)
