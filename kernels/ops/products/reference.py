"""Sums of products in plain torch: fp32 products, rounded once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..nf4 import NF4Tensor, dequantize_nf4
from .terms import Sum


def sums_of_products(sums: Sequence[Sum]) -> None:
    """Write every sum to its `out`."""
    for terms, out, scale, bias in sums:
        total = torch.zeros(out.shape, device=out.device)
        for a, b, turned, factor in terms:
            b = dense(b, factor, a.dtype)
            b = b.t() if turned else b
            total += a[:, : len(b)].float() @ b
        total *= scale
        out.copy_(total if bias is None else total + bias)


def dense(b: Tensor | NF4Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return factor b in fp32, rounded to what `dtype`, that of a, holds."""
    if isinstance(b, NF4Tensor):
        return dequantize_nf4(b, dtype).float()
    return (b if b.dtype == torch.bfloat16 else (factor * b).to(dtype)).float()
