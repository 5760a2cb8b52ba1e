"""The product with a packed weight in plain torch, with the whole weight dense."""

import torch.nn.functional as F
from torch import Tensor

from .dense import Packed, dequantize


def frozen_linear(x: Tensor, q: Packed, bias: Tensor | None = None) -> Tensor:
    """Return x [..., K] W'^T + bias, where q dequantizes to W' [N, K] in x's dtype."""
    return F.linear(x, dequantize(q, x.dtype), bias)
