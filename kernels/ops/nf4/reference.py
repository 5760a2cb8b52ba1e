"""NF4 and FP4 in plain torch, on any device: what every other backend is checked against.

`__init__.py` has the maths.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensor import NESTED_BLOCK

CHUNK = 1 << 22  # values at a time, bounds the temporaries to about 50 MB; a multiple of all blocks


def quantize(
    flat: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float
) -> tuple[Tensor, Tensor]:
    """Quantize flat [n]: codes uint8 [ceil(n / 2)], absmax fp32 [ceil(n / block_size)]."""
    pieces = [blocks.abs().amax(dim=1) for blocks in _blocks(flat, block_size)]
    absmax = torch.cat(pieces) if pieces else flat.new_empty(0, dtype=torch.float32)
    return encode(flat, absmax, thresholds, order, block_size, floor), absmax


def encode(
    flat: Tensor, scales: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float
) -> Tensor:
    """Return the code of the nearest level for every value of flat [n]: uint8 [ceil(n / 2)]."""
    codes, n = [], flat.numel()
    parts = scales.split(CHUNK // block_size)
    for blocks, scale in zip(_blocks(flat, block_size), parts, strict=False):
        scale = torch.where(scale.abs() < floor, floor, scale)
        scaled = blocks * (1 / scale)[:, None]
        index = torch.bucketize(scaled.view(-1), thresholds, out_int32=True)
        code = order.index_select(0, index)
        codes.append(code[::2] << 4 | code[1::2])
    if not codes:
        return flat.new_empty(0, dtype=torch.uint8)
    return torch.cat(codes)[: (n + 1) // 2]  # an odd length keeps one padding 0


def search(
    flat: Tensor,
    absmax: Tensor,
    thresholds: Tensor,
    table: Tensor,
    factors: Tensor,
    block_size: int,
    floor: float,
) -> Tensor:
    """Return for every block absmax times the best of the `factors`, fp32 [blocks].

    The best one is the first with the least squared error. `table` holds the levels in ascending
    order.
    """
    inverse, found = 1 / factors, []
    parts = absmax.split(CHUNK // block_size)
    for blocks, scale in zip(_blocks(flat, block_size), parts, strict=False):
        x = blocks * (1 / scale.clamp(min=floor))[:, None]
        least: Tensor | None = None
        for factor, over in zip(factors, inverse, strict=True):
            index = torch.bucketize(x * over, thresholds, out_int32=True)
            off = table.index_select(0, index.view(-1)).view(x.shape) * factor - x
            error = _halving_sum(off * off)
            if least is None:
                least, best = error, factor.expand_as(error)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, factor, best)
        found.append(scale * best)
    return torch.cat(found) if found else absmax


def _halving_sum(x: Tensor) -> Tensor:
    """Sum the rows of x [blocks, 2^k]: [blocks].

    The halves are added until one is left: an order that any backend can keep, so that all choose
    the same factor.
    """
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def _blocks(flat: Tensor, block_size: int) -> Iterator[Tensor]:
    """Yield flat [n] as fp32 [blocks, block_size], piece by piece.

    The last block is filled with zeros, which raise no absmax.
    """
    for piece in flat.split(CHUNK) if flat.numel() else ():
        yield F.pad(piece.float(), (0, -piece.numel() % block_size)).view(-1, block_size)


def dequantize(
    codes: Tensor, scales: Tensor, pairs: Tensor, n: int, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Return the n values of codes uint8 [ceil(n / 2)], with scales fp32 [ceil(n / block_size)].

    `pairs` fp32 [256, 2] are the two levels of every byte.
    """
    flat = pairs.index_select(0, codes.int()).view(-1)[:n]
    full = n - n % block_size
    flat[:full].view(-1, block_size).mul_(scales[: full // block_size, None])
    if full < n:
        flat[full:].mul_(scales[-1])
    return flat.to(dtype)


def dequantize_at(codes: Tensor, scales: Tensor, table: Tensor, at: Tensor) -> Tensor:
    """Return the values at places `at` int64 [...] of the flat tensor, whose scales are given."""
    byte = codes[at >> 1]
    code = torch.where(at % 2 == 1, byte & 15, byte >> 4)
    return table[code.int()] * scales


def mean_absmax(absmax: Tensor) -> Tensor:
    """Return the offset of double quantization, fp32 [1]."""
    offset = absmax.mean().view(1)
    if not torch.isfinite(offset):  # the sum overflowed
        offset = (absmax / absmax.numel()).sum().view(1)
    return offset


def quantize_absmax(
    absmax: Tensor, offset: Tensor, middles: Tensor, floor: float
) -> tuple[Tensor, Tensor]:
    """Quantize absmax fp32 [blocks], from which offset fp32 [1] is subtracted.

    `middles` fp32 [255] are those of the dynamic map's levels. Returns codes uint8 [blocks] and
    nested_absmax fp32 [ceil(blocks / NESTED_BLOCK)].
    """
    groups = F.pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = groups.abs().amax(dim=1)
    scaled = groups * (1 / nested.clamp(min=floor))[:, None]
    codes = torch.bucketize(scaled.view(-1), middles, out_int32=True).to(torch.uint8)
    return codes[: absmax.numel()].contiguous(), nested


def dequantize_absmax(codes: Tensor, nested: Tensor, offset: Tensor, levels: Tensor) -> Tensor:
    """Undo `quantize_absmax`, up to its rounding: return absmax, fp32 [...].

    codes are uint8 [...], and nested is the nested scale of each, fp32 [...].
    """
    values = levels.index_select(0, codes.flatten().int()).view(codes.shape)
    return values.mul_(nested).add_(offset)
