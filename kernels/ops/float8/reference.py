"""float8 in plain torch, on any device: values rounded to e4m3, products in fp32."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..nf4 import NF4Tensor, block_scales, dequantize_nf4

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
FLOOR = 1e-30  # a smaller maximum divides as if it were this, so that 448 / FLOOR stays finite
PANEL = 1 << 24  # values that are rounded at a time: bounds the fp32 temporaries


def scale_of(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and reciprocal, fp32 [...], that bring `largest` fp32 [...] to 448."""
    bounded = largest.clamp(min=FLOOR)
    return bounded / LARGEST, LARGEST / bounded


def _e4m3(x: Tensor) -> Tensor:
    """Return x fp32 in e4m3, of whose range the last bit of a scale may lead out."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def rounded(w: Tensor, mean: Tensor, over: Tensor) -> Tensor:
    """Return w [N, K] less `mean` fp32 [K] or [1], times `over` fp32 [], in e4m3."""
    out = torch.empty(w.shape, dtype=E4M3, device=w.device)
    step = max(1, PANEL // max(1, w.shape[1]))
    for start in range(0, len(w), step):
        out[start : start + step] = _e4m3((w[start : start + step] - mean) * over)
    return out


def scaled_rows(parts: Sequence[Tensor], scales: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return e4m3 [M, N] of all parts [M, n], and the scales of the rows, fp32 [M, 1]."""
    pairs = [(x.float(), x.new_ones((), dtype=torch.float32) if s is None else s)
             for x, s in zip(parts, scales, strict=True)]  # fmt: skip
    largest = torch.stack([x.abs().amax(1) * s for x, s in pairs]).amax(0)
    scale, over = scale_of(largest[:, None])
    return torch.cat([_e4m3(x * (s * over)) for x, s in pairs], dim=1), scale


def weight_rows(q: NF4Tensor, over: Tensor) -> Tensor:
    """Return q [N, K], whose scales are multiplied by `over` fp32 [], in e4m3."""
    scales = block_scales(q) * over
    return _e4m3(dequantize_nf4(_with(q, scales), torch.float32))


def weight_columns(q: NF4Tensor, over: Tensor, out: Tensor) -> None:
    """Write the transpose of `weight_rows` to e4m3 [K, N]."""
    out.copy_(weight_rows(q, over).t())


def _with(q: NF4Tensor, scales: Tensor) -> NF4Tensor:
    return replace(q, absmax=scales, nested_absmax=None, offset=None)


def product(
    x: tuple[Tensor, Tensor], w: Tensor, scales: Tensor, fast: bool, out: Tensor | None
) -> Tensor:
    """Return x [M, K] w^T for e4m3 w [N, K] with `scales` fp32 [1, N], in bf16 [M, N]."""
    values, scale = x
    y = (values.float() @ w.float().t()).mul_(scale).mul_(scales).bfloat16()
    return y if out is None else out.copy_(y)
