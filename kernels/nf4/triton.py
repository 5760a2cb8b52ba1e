"""NF4 and FP4 on a GPU, bit for bit the reference.

Dequantizing: a thread takes 4 bytes and writes 8 values in one 128-bit store, without shared
memory. A tile is [rows, TILE] bytes, a row lies inside one block of values, so that a thread reads
one scale; double quantization is undone on the way, and no array of fp32 scales exists. The two
levels of a byte lie beside each other in a table of 256 pairs, 2 KB that stay in the nearest cache.
The product level * scale is rounded once, from fp32, as everywhere: a table in bf16 would round
twice.

Quantizing: a tile is [rows, block_size] values. absmax is the largest bit pattern of |x|, which
orders like the numbers and puts NaN on top.

Both are compiled without contraction of a product and a sum into one rounding.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import search
from .tensor import NF4Tensor

__all__ = ["dequantize", "encode", "quantize", "search"]

BYTES, WARPS = 512, 4  # of one program
EXACT = {"enable_fp_fusion": False}


@triton.jit
def _dequantize(
    CODES, SCALES, NESTED, OFFSET, MAP, PAIRS, Y, n,
    largest: tl.constexpr, DOUBLE: tl.constexpr, WHOLE: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (ROWS * TILE)  # bytes; HALF of them share a scale
    row = tl.arange(0, ROWS)
    block = start // HALF + row * TILE // HALF
    byte = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    at = row[:, None] * (2 * TILE) + tl.arange(0, 2 * TILE)[None, :]
    if WHOLE:  # all of the program's values are there
        of_row, of_byte, of_value = None, None, None
        packed = tl.load(CODES + start + byte).to(tl.int32)
        code = tl.load(SCALES + block)
    else:
        left = n - 2 * start
        of_row, of_byte, of_value = row * (2 * TILE) < left, byte * 2 < left, at < left
        packed = tl.load(CODES + start + byte, mask=of_byte, other=0).to(tl.int32)
        code = tl.load(SCALES + block, mask=of_row, other=0)
    if DOUBLE:
        nested = tl.load(NESTED + block // 256, mask=of_row)
        scale = tl.load(MAP + code.to(tl.int32)) * nested + tl.load(OFFSET)
        scale = tl.minimum(scale, largest)
    else:
        scale = code
    pair = PAIRS + packed * 2
    dtype: tl.constexpr = Y.dtype.element_ty
    high, low = tl.load(pair) * scale[:, None], tl.load(pair + 1) * scale[:, None]
    values = tl.interleave(high.to(dtype), low.to(dtype))
    tl.store(Y + 2 * start + at, values, mask=of_value)


@triton.jit
def _quantize(
    X, THRESHOLDS, ORDER, CODES, SCALES, n,
    floor: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    inside = row * BLOCK < n
    if GIVEN:
        scale = tl.load(SCALES + row, mask=inside, other=0.0)
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        scale = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
        tl.store(SCALES + row, scale, mask=inside)
    over = tl.div_rn(1.0, tl.where(tl.abs(scale) < floor, floor, scale))
    scaled = x * over[:, None]
    index = tl.zeros((ROWS, BLOCK), tl.int32)
    for i in tl.static_range(15):
        index += (tl.load(THRESHOLDS + i) < scaled).to(tl.int32)
    code = tl.load(ORDER + index).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(CODES + byte, ((high << 4) | low).to(tl.uint8), mask=byte * 2 < n)


def dequantize(q: NF4Tensor, pairs: Tensor, scale_map: Tensor, dtype: torch.dtype) -> Tensor:
    """The flat dense tensor [n]; `pairs` fp32 [256, 2] are the two levels of each byte, `scale_map`
    fp32 [256] those of the scales.
    """
    n = math.prod(q.shape)
    y = torch.empty(n, dtype=dtype, device=q.device)
    tile = min(q.block_size // 2, 128)
    codes, absmax = q.codes.contiguous(), q.absmax.contiguous()
    nested, offset = absmax, absmax
    if q.double_quant:
        nested, offset = q.nested_absmax.contiguous(), q.offset
    if n:
        _dequantize[(triton.cdiv(n, 2 * BYTES),)](
            codes, absmax, nested, offset, scale_map, pairs, y, n, torch.finfo(q.dtype).max,
            q.double_quant, n % (2 * BYTES) == 0, q.block_size // 2, BYTES // tile, tile,
            num_warps=WARPS, **EXACT,
        )  # fmt: skip
    return y


def _encode(
    flat: Tensor, scales: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float,
    given: bool,
) -> Tensor:  # fmt: skip
    n = flat.numel()
    codes = torch.empty(triton.cdiv(n, 2), dtype=torch.uint8, device=flat.device)
    rows = max(1, 1024 // block_size)
    if n:
        _quantize[(triton.cdiv(n, rows * block_size),)](
            flat, thresholds, order, codes, scales, n, floor, given, rows, block_size,
            num_warps=WARPS, **EXACT,
        )  # fmt: skip
    return codes


def quantize(
    flat: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float
) -> tuple[Tensor, Tensor]:
    """As reference.quantize."""
    blocks = triton.cdiv(flat.numel(), block_size)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    return _encode(flat, absmax, thresholds, order, block_size, floor, False), absmax


def encode(
    flat: Tensor, scales: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float
) -> Tensor:
    """As reference.encode."""
    return _encode(flat, scales, thresholds, order, block_size, floor, True)
