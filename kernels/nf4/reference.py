"""NF4 in plain torch, on any device: what every other backend is checked against. See the package
for the maths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 22  # values quantized at a time: bounds the int32 and fp32 temporaries to about 50 MB


def quantize(
    flat: Tensor, thresholds: Tensor, block_size: int, floor: float
) -> tuple[Tensor, Tensor]:
    """flat [n] -> codes uint8 [ceil(n / 2)], absmax fp32 [ceil(n / block_size)]."""
    if flat.numel() == 0:
        return flat.new_empty(0, dtype=torch.uint8), flat.new_empty(0, dtype=torch.float32)
    pieces = [_quantize_chunk(x.float(), thresholds, block_size, floor) for x in flat.split(CHUNK)]
    codes, absmax = zip(*pieces, strict=True)
    return torch.cat(codes), torch.cat(absmax)


def _quantize_chunk(
    x: Tensor, thresholds: Tensor, block_size: int, floor: float
) -> tuple[Tensor, Tensor]:
    short = -x.numel() % block_size
    blocks = F.pad(x, (0, short)).view(-1, block_size)  # zeros never raise an absmax
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=floor))[:, None]
    index = torch.bucketize(scaled.view(-1), thresholds, out_int32=True).to(torch.uint8)
    index = index[: x.numel() + x.numel() % 2]  # an odd length keeps one padding 0, of code 7
    return index[::2] << 4 | index[1::2], absmax


def dequantize(codes: Tensor, absmax: Tensor, levels: Tensor, n: int, block_size: int) -> Tensor:
    """codes uint8 [ceil(n / 2)], absmax fp32 [ceil(n / block_size)] -> fp32 [n]."""
    # byte -> its two values, fp32 [256, 2]
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    flat = pairs.index_select(0, codes.int()).view(-1)[:n]
    full = n - n % block_size
    flat[:full].view(-1, block_size).mul_(absmax[: full // block_size, None])
    if full < n:
        flat[full:].mul_(absmax[-1])
    return flat


def quantize_absmax(
    absmax: Tensor, levels: Tensor, block: int, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """absmax fp32 [blocks] -> codes uint8 [blocks], nested_absmax fp32 [ceil(blocks / block)],
    offset fp32 [].
    """
    if absmax.numel() == 0:
        return absmax.to(torch.uint8), absmax, absmax.new_zeros(())
    offset = absmax.mean()
    groups = F.pad(absmax - offset, (0, -absmax.numel() % block)).view(-1, block)
    nested = groups.abs().amax(dim=1)
    scaled = groups * (1 / nested.clamp(min=floor))[:, None]
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled.view(-1), middles, out_int32=True).to(torch.uint8)
    return codes[: absmax.numel()].contiguous(), nested, offset


def dequantize_absmax(
    codes: Tensor, nested: Tensor, offset: Tensor, levels: Tensor, block: int
) -> Tensor:
    """The inverse of `quantize_absmax`, up to its rounding: fp32 [blocks]."""
    values = levels.index_select(0, codes.int())
    return values.mul_(nested.repeat_interleave(block)[: codes.numel()]).add_(offset)
