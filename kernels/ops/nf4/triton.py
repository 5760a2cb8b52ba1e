"""NF4 and FP4 on a GPU, bit for bit the reference.

Dequantizing: a thread takes 4 bytes and writes 8 values in one 128-bit store, without shared
memory. A tile is [rows, TILE] bytes. A row lies inside one block of values, so that a thread reads
one scale. Double quantization is undone on the way, and no array of fp32 scales exists. The product
level * scale is rounded once, from fp32, as everywhere: levels in bf16 would round twice.

The 16 levels are looked up without memory on NVIDIA's GPUs (`ptx`). The instruction prmt picks 4
bytes out of 8, each by 3 bits of a selector: two of them and a choice by the code's fourth bit give
one byte of the levels of 4 codes; from all 4 bytes of fp32 it takes 47 instructions for 8 values.
Elsewhere the two levels of a byte are read from a table of 256 pairs, 2 KB that stay in the nearest
cache, with half as many instructions; but a warp then asks for 32 places of it at a time, which
keeps that cache busy for longer than the memory needs.

Quantizing: a tile is [rows, block_size] values. absmax is the largest bit pattern of |x|, which
orders like the numbers and puts NaN on top.

Both are compiled without contraction of a product and a sum into one rounding.
"""

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from .reference import search
from .tensor import LEVELS, NF4Tensor, dynamic_map, largest_scale, pairs

__all__ = ["dequantize", "encode", "quantize", "search"]

BYTES, THREADS = 512, 128  # of one pass
PASSES = 4  # of one program, which share the constants
EXACT = {"enable_fp_fusion": False}


@functools.cache
def ptx(quant_type: str) -> str:
    """Return code for the fp32 levels of 4 bytes of codes, $8.

    $0 to $3 get the levels of the high nibbles, $4 to $7 those of the low ones.

    prmt d, a, b, c: byte i of d is that byte of the eight in (b, a) which nibble i of c names. The
    nibbles of a 16-bit half of $8 are four codes, the low one of each byte first.
    """
    words = struct.pack("<16f", *LEVELS[quant_type])
    code = [
        "and.b32 s0, $8, 0x77777777;",
        "shr.u32 s1, s0, 16;",
        "and.b32 m0, $8, 0x88888888;",
        "shr.u32 m0, m0, 1;",
        "shr.u32 m1, m0, 16;",
        # a whole byte of ones for each code above 7
        "prmt.b32 m0, 0x00000000, 0xffffffff, m0;",
        "prmt.b32 m1, 0x00000000, 0xffffffff, m1;",
    ]
    for half in (0, 1):
        for plane in range(4):  # byte `plane` of the levels of the half's four codes
            a, b, c, d = (
                f"0x{int.from_bytes(words[16 * part + plane : 16 * part + 16 : 4], 'little'):08x}"
                for part in range(4)
            )
            code += [
                f"prmt.b32 x, {a}, {b}, s{half};",
                f"prmt.b32 y, {c}, {d}, s{half};",
                f"lop3.b32 p{plane}, m{half}, y, x, 0xca;",  # m ? y : x
            ]
        # p0 .. p3 hold the four bytes of four levels: transposed, a level a register
        byte = 2 * half
        code += [
            "prmt.b32 x, p0, p1, 0x5140;",
            "prmt.b32 y, p2, p3, 0x5140;",
            f"prmt.b32 ${4 + byte}, x, y, 0x5410;",
            f"prmt.b32 ${byte}, x, y, 0x7632;",
            "prmt.b32 x, p0, p1, 0x7362;",
            "prmt.b32 y, p2, p3, 0x7362;",
            f"prmt.b32 ${5 + byte}, x, y, 0x5410;",
            f"prmt.b32 ${1 + byte}, x, y, 0x7632;",
        ]
    return "{ .reg .b32 s0, s1, m0, m1, x, y, p0, p1, p2, p3; " + " ".join(code) + " }"


@triton.jit
def values_of(packed, scale, PAIRS, PTX: tl.constexpr, dtype: tl.constexpr):
    """Return the values [rows, 2 n] of bytes [rows, n] with a scale [rows] each."""
    if PTX is None:
        pair = PAIRS + packed.to(tl.int32) * 2
        high, low = tl.load(pair), tl.load(pair + 1)
    else:
        high, low = tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,=r,=r,=r,=r,r", [packed], (tl.float32, tl.float32), True, 4
        )
    high, low = high * scale[:, None], low * scale[:, None]
    return tl.interleave(high.to(dtype), low.to(dtype))


@triton.jit
def scales_of(
    SCALES, NESTED, offset, MAP, block, mask, largest: tl.constexpr, DOUBLE: tl.constexpr
):
    """Return the scales of blocks, fp32."""
    other: tl.constexpr = None if mask is None else 0
    code = tl.load(SCALES + block, mask=mask, other=other)
    if DOUBLE:
        nested = tl.load(NESTED + block // 256, mask=mask, other=other)
        scale = tl.load(MAP + code.to(tl.int32)) * nested + offset
        return tl.minimum(scale, largest)
    else:
        return code


@triton.jit
def _dequantize(
    CODES, SCALES, NESTED, OFFSET, MAP, PAIRS, FACTOR, Y, n,
    largest: tl.constexpr, DOUBLE: tl.constexpr, PTX: tl.constexpr, WHOLE: tl.constexpr,
    HALF: tl.constexpr, PASSES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # in bytes, HALF of which share a scale
    start_of_program = tl.program_id(0).to(tl.int64) * (PASSES * ROWS * TILE)
    row = tl.arange(0, ROWS)
    byte = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    at = row[:, None] * (2 * TILE) + tl.arange(0, 2 * TILE)[None, :]
    offset = tl.load(OFFSET)
    for i in tl.static_range(PASSES):
        start = start_of_program + i * (ROWS * TILE)
        block = start // HALF + row * TILE // HALF
        of_row, of_byte, of_value = None, None, None
        if not WHOLE:  # not all of the program's values are there
            left = n - 2 * start
            of_row, of_byte, of_value = row * (2 * TILE) < left, byte * 2 < left, at < left
        packed = tl.load(CODES + start + byte, mask=of_byte)
        scale = scales_of(SCALES, NESTED, offset, MAP, block, of_row, largest, DOUBLE)
        if FACTOR is not None:
            scale = scale * tl.load(FACTOR)
        values = values_of(packed, scale, PAIRS, PTX, Y.dtype.element_ty)
        tl.store(Y + 2 * start + at, values, mask=of_value)


@triton.jit
def _dequantize_each(
    TABLE, MAP, PAIRS, Y, n,
    largest: tl.constexpr, DOUBLE: tl.constexpr, PTX: tl.constexpr, WHOLE: tl.constexpr,
    HALF: tl.constexpr, PASSES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A row of TABLE has the addresses of a tensor's codes, scales, nested scales and offset."""
    which = tl.program_id(1).to(tl.int64)
    entry = TABLE + 4 * which
    fp32 = tl.pointer_type(tl.float32)
    u8 = tl.pointer_type(tl.uint8)
    codes = tl.multiple_of(tl.load(entry).to(u8), 16)
    nested, offset = tl.load(entry + 2).to(fp32), tl.load(entry + 3).to(fp32)
    if DOUBLE:
        scales = tl.load(entry + 1).to(u8)
        _dequantize(
            codes, scales, nested, offset, MAP, PAIRS, None, Y + which * n, n,
            largest, DOUBLE, PTX, WHOLE, HALF, PASSES, ROWS, TILE,
        )  # fmt: skip
    else:
        scales = tl.load(entry + 1).to(fp32)
        _dequantize(
            codes, scales, nested, offset, MAP, PAIRS, None, Y + which * n, n,
            largest, DOUBLE, PTX, WHOLE, HALF, PASSES, ROWS, TILE,
        )  # fmt: skip


@triton.jit
def _dequantize_rows(
    CODES, SCALES, NESTED, OFFSET, MAP, PAIRS, PICKED, Y, N, width,
    largest: tl.constexpr, DOUBLE: tl.constexpr, PTX: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`width` bytes to a row, a whole number of blocks."""
    picked = tl.program_id(0).to(tl.int64)
    source = tl.load(PICKED + picked)
    known = (source >= 0) & (source < N)
    source = tl.where(known, source, 0)
    offset = tl.load(OFFSET)
    start = tl.program_id(1) * (ROWS * TILE)
    row = tl.arange(0, ROWS)
    byte = start + row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    at = 2 * start + row[:, None] * (2 * TILE) + tl.arange(0, 2 * TILE)[None, :]
    packed = tl.load(CODES + source * width + byte, mask=byte < width)
    block = source * (width // HALF) + (start + row * TILE) // HALF
    of_row = start + row * TILE < width
    scale = scales_of(SCALES, NESTED, offset, MAP, block, of_row, largest, DOUBLE)
    scale = tl.where(known, scale, float("nan"))
    values = values_of(packed, scale, PAIRS, PTX, Y.dtype.element_ty)
    tl.store(Y + picked * (2 * width) + at, values, mask=at < 2 * width)


@triton.jit
def _either(TABLE, i: tl.constexpr, j: tl.constexpr, chosen):
    return tl.where(chosen, tl.load(TABLE + i), tl.load(TABLE + j))


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
    # how many of the 15 ascending thresholds are smaller, by halving
    eight = tl.load(THRESHOLDS + 7) < scaled
    four = tl.where(eight, tl.load(THRESHOLDS + 11), tl.load(THRESHOLDS + 3)) < scaled
    upper = tl.where(four, tl.load(THRESHOLDS + 13), tl.load(THRESHOLDS + 9))
    lower = tl.where(four, tl.load(THRESHOLDS + 5), tl.load(THRESHOLDS + 1))
    two = tl.where(eight, upper, lower) < scaled
    upper = tl.where(four, _either(THRESHOLDS, 14, 12, two), _either(THRESHOLDS, 10, 8, two))
    lower = tl.where(four, _either(THRESHOLDS, 6, 4, two), _either(THRESHOLDS, 2, 0, two))
    one = tl.where(eight, upper, lower) < scaled
    index = tl.where(eight, 8, 0) + tl.where(four, 4, 0) + tl.where(two, 2, 0) + one.to(tl.int32)
    code = tl.load(ORDER + index).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(CODES + byte, ((high << 4) | low).to(tl.uint8), mask=byte * 2 < n)


def packed_arguments(q: NF4Tensor) -> tuple[Tensor, ...]:
    """Return the arguments CODES, SCALES, NESTED, OFFSET, MAP and PAIRS of the kernels."""
    codes, absmax, nested, offset = q.codes, q.absmax, q.nested_absmax, q.offset
    if nested is None or offset is None:
        nested = offset = absmax
    on = codes.device
    return codes, absmax, nested, offset, dynamic_map(on), pairs(q.quant_type, on)


def packed_options(q: NF4Tensor) -> dict[str, Any]:
    """Return what of the arguments is known when the kernels are compiled."""
    return _packed_options(
        q.quant_type, q.nested_absmax is not None, q.dtype, dispatch.compiles_to()
    )


@functools.cache
def _packed_options(
    quant_type: str, double_quant: bool, dtype: torch.dtype, language: str
) -> dict[str, Any]:
    by_ptx = ptx(quant_type) if language == "ptx" else None
    return {"largest": largest_scale(dtype), "DOUBLE": double_quant, "PTX": by_ptx, **EXACT}


@functools.cache
def _dequantize_options(
    block_size: int, whole: bool, quant_type: str, double_quant: bool, dtype: torch.dtype,
    language: str,
) -> dict[str, Any]:  # fmt: skip
    """Return the options of `_dequantize`: how it cuts its work, and what is packed."""
    half = block_size // 2
    tile = min(half, 128)
    cut = {"WHOLE": whole, "HALF": half, "PASSES": PASSES, "ROWS": BYTES // tile, "TILE": tile}
    packed = _packed_options(quant_type, double_quant, dtype, language)
    return {**cut, "num_warps": THREADS // dispatch.lanes(), **packed}


def dequantize(q: NF4Tensor, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """Return the dense tensor, whose scales are multiplied by `factor` fp32 [] if it is given."""
    y = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    n, values = y.numel(), 2 * PASSES * BYTES
    if n:
        options = _dequantize_options(
            q.block_size, n % values == 0, q.quant_type, q.nested_absmax is not None, q.dtype,
            dispatch.compiles_to(),
        )  # fmt: skip
        grid = (-(-n // values),)
        dispatch.launch(_dequantize, grid, *packed_arguments(q), factor, y, n, **options)
    return y


def dequantize_each(packed: Sequence[NF4Tensor], dtype: torch.dtype) -> Tensor:
    """Return tensors that differ in values alone, dense and one after the other: [E, *shape].

    One launch reads all of them by their addresses. Each must be `addressed`.
    """
    first = packed[0]
    y = torch.empty((len(packed), *first.shape), dtype=dtype, device=first.codes.device)
    n, values = y[0].numel(), 2 * PASSES * BYTES
    if n:
        *_, scale_map, both = packed_arguments(first)
        addresses = tuple(dispatch.address(t) for q in packed for t in packed_arguments(q)[:4])
        table = dispatch.address_table(addresses, y.device)
        grid = (-(-n // values), len(packed))
        options = _dequantize_options(
            first.block_size, n % values == 0, first.quant_type, first.double_quant, first.dtype,
            dispatch.compiles_to(),
        )  # fmt: skip
        dispatch.launch(_dequantize_each, grid, table, scale_map, both, y, n, **options)
    return y


def dequantize_rows(q: NF4Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of q [N, K] that `rows` int64 [n] picks: [n, K].

    K must be a multiple of the block. A row that is not there is NaN: nothing waits for the device
    to find out.
    """
    (N, K), n = q.shape, rows.shape[0]
    y = torch.empty((n, K), dtype=dtype, device=q.device)
    tile = min(q.block_size // 2, 128)
    if y.numel():
        dispatch.launch(
            _dequantize_rows, (n, -(-K // (2 * BYTES))), *packed_arguments(q), rows.contiguous(), y,
            N, K // 2, HALF=q.block_size // 2, ROWS=BYTES // tile, TILE=tile,
            num_warps=THREADS // dispatch.lanes(), **packed_options(q),
        )  # fmt: skip
    return y


def _encode(
    flat: Tensor, scales: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float,
    given: bool,
) -> Tensor:  # fmt: skip
    n = flat.numel()
    codes = torch.empty(-(-n // 2), dtype=torch.uint8, device=flat.device)
    rows = max(1, 1024 // block_size)
    if n:
        dispatch.launch(
            _quantize, (-(-n // (rows * block_size)),), flat, thresholds, order, codes, scales,
            n, floor, given, rows, block_size, num_warps=THREADS // dispatch.lanes(), **EXACT,
        )  # fmt: skip
    return codes


def quantize(
    flat: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float
) -> tuple[Tensor, Tensor]:
    """Launch the kernel that finds scales and codes; see reference.quantize."""
    blocks = -(-flat.numel() // block_size)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    return _encode(flat, absmax, thresholds, order, block_size, floor, False), absmax


def encode(
    flat: Tensor, scales: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float
) -> Tensor:
    """Launch the kernel with scales that are given; see reference.encode."""
    return _encode(flat, scales, thresholds, order, block_size, floor, True)
