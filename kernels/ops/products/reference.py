"""Sums of products in plain torch: fp32 products, rounded once."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nf4 import NF4Tensor, dequantize_nf4
from .terms import Sum


def sums_of_products(sums: Sequence[Sum]) -> None:
    """Write every sum to its `out` and to its `turned`."""
    for terms, out, scale, bias, turned in sums:
        total: Tensor | None = None
        result = out if turned is None else turned.t()
        assert result is not None  # or there is no sum
        for a, b, lies_turned, factor, start in terms:
            b = dense(b, factor, a.dtype)
            b = b.t() if lies_turned else b
            product = F.pad(a[:, : len(b)].float() @ b, (0, 0, start, len(result) - start - len(a)))
            total = product if total is None else total + product
        assert total is not None  # there is a term
        total = scale * total if bias is None else scale * total + bias
        if out is not None:
            out.copy_(total)
        if turned is not None:
            turned.copy_(total.t())


def dense(b: Tensor | NF4Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return factor b in fp32, rounded to what `dtype`, that of a, holds."""
    if isinstance(b, NF4Tensor):
        return dequantize_nf4(b, dtype).float()
    return (b if b.dtype == torch.bfloat16 else (factor * b).to(dtype)).float()
