"""int8 in plain torch, on any device; `__init__.py` has the formulas."""

import torch
from torch import Tensor

CHUNK = 1 << 22  # values quantized at a time: bounds the fp32 temporaries to about 50 MB


def quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize w [N, K]: int8 [N, K], scales fp32 [N]; a row of zeros has scale 0."""
    values = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scale = torch.zeros(len(w), dtype=torch.float32, device=w.device)
    step = max(1, CHUNK // max(1, w.shape[1]))
    for start in range(0, len(w) if w.numel() else 0, step):
        rows = w[start : start + step].float()
        largest = rows.abs().amax(dim=1)
        over = 127 / torch.where(largest == 0, 1, largest)
        # bounded for the smallest of subnormals, where 127 / scale overflows
        over = over.clamp(max=torch.finfo(torch.float32).max)
        values[start : start + step] = (rows * over[:, None]).round().to(torch.int8)
        scale[start : start + step] = largest
    return values, scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return int8 [..., K] times scales fp32 [..., 1] / 127, computed in fp32."""
    largest = torch.finfo(torch.float32).max
    huge = scale > largest / 127  # there divide first: the product would overflow
    first, then = torch.where(huge, scale * (1 / 127), scale), torch.where(huge, 1, 1 / 127)
    return (values * first).mul_(then).clamp_(-largest, largest).to(dtype)
