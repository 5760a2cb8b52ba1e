"""Calls of the C++ kernels in cpu.cpp, for tensors in host memory.

The functions that quantize have the signatures of reference.py. Those that read a packed tensor
take it whole.
"""

import ctypes
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import CPU_DTYPES, FLOAT, INT64, POINTER, address
from .tensor import NESTED_BLOCK, NF4Tensor, dynamic_map, largest_scale, levels

# Values: fp16 (and for the search bf16) is widened to fp32 piece by piece, 4 MB at a time. It is a
# multiple of every block size. Larger pieces leave larger holes in the heap (docs/dev/LOG.md).
CHUNK = 1 << 20
HOST = torch.device("cpu")


class PackedNF4(ctypes.Structure):
    """`PackedNF4` of packed.h: a packed tensor."""

    _fields_ = (
        *((name, POINTER) for name in ("codes", "absmax", "nested", "offset", "map", "table")),
        ("block", INT64),
        ("largest", FLOAT),
    )


class Dequantize(PackedNF4):
    """`Dequantize` of cpu.cpp: the arguments of `nf4_dequantize`."""

    _fields_ = (("out", POINTER), ("first", INT64), ("n", INT64))


class Product(PackedNF4):
    """`Product` of cpu.cpp: the arguments of `nf4_product`."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "bias", "y")),
        *((name, INT64) for name in ("M", "N", "K")),
    )


def quantize(
    flat: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float
) -> tuple[Tensor, Tensor]:
    """Call the C++ kernel `nf4_quantize`; see reference.quantize."""
    blocks = -(-flat.numel() // block_size)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    return _codes("nf4_quantize", flat, absmax, thresholds, order, block_size, floor), absmax


def encode(
    flat: Tensor, scales: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float
) -> Tensor:
    """Call the C++ kernel `nf4_encode`; see reference.encode."""
    return _codes("nf4_encode", flat, scales, thresholds, order, block_size, floor)


def _codes(
    op: str,
    flat: Tensor,
    scales: Tensor,
    thresholds: Tensor,
    order: Tensor,
    block_size: int,
    floor: float,
) -> Tensor:
    """Return the codes of flat; `scales` are read, or written by the op that quantizes."""
    taken = flat.dtype if flat.dtype in CPU_DTYPES else torch.float32
    run = dispatch.function(f"{op}_{CPU_DTYPES[taken]}", *[POINTER] * 5, INT64, INT64, FLOAT)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=flat.device)
    tables = address(thresholds), address(order)
    step = flat.numel() if flat.dtype == taken else CHUNK
    for start in range(0, flat.numel(), max(1, step)):
        x = flat[start : start + step].to(taken)
        places = address(codes) + start // 2, address(scales) + 4 * (start // block_size)
        run(address(x), *tables, *places, x.numel(), block_size, floor)
    return codes


def search(
    flat: Tensor,
    absmax: Tensor,
    thresholds: Tensor,
    table: Tensor,
    factors: Tensor,
    block_size: int,
    floor: float,
) -> Tensor:
    """Call the C++ kernel `nf4_search`; see reference.search."""
    run = dispatch.function("nf4_search", *[POINTER] * 6, *[INT64] * 3, FLOAT)
    scales, inverse = absmax.clone(), 1 / factors
    tables = [address(t) for t in (thresholds, table, factors, inverse)]
    for start in range(0, flat.numel(), CHUNK):
        x = flat[start : start + CHUNK].float()
        place = address(scales) + 4 * (start // block_size)
        run(address(x), *tables, place, len(factors), x.numel(), block_size, floor)
    return scales


def quantize_absmax(
    absmax: Tensor, offset: Tensor, middles: Tensor, floor: float
) -> tuple[Tensor, Tensor]:
    """Call the C++ kernel `nf4_quantize_scales`; see reference.quantize_absmax."""
    n = absmax.numel()
    codes = torch.empty(n, dtype=torch.uint8, device=absmax.device)
    nested = torch.empty(-(-n // NESTED_BLOCK), dtype=torch.float32, device=absmax.device)
    run = dispatch.function("nf4_quantize_scales", *[POINTER] * 4, INT64, FLOAT, FLOAT)
    run(*(address(t) for t in (absmax, middles, codes, nested)), n, offset.item(), floor)
    return codes, nested


@functools.cache
def _tables(quant_type: str) -> tuple[int, int]:
    """Return the addresses of the dynamic map and the levels, which live until the process ends."""
    return address(dynamic_map(HOST)), address(levels(quant_type, HOST))


def _arguments(q: NF4Tensor) -> tuple:
    """Return the fields of PackedNF4; q must live until the call."""
    parts = q.codes, q.absmax, q.nested_absmax, q.offset
    tables = _tables(q.quant_type)
    return *map(address, parts), *tables, q.block_size, largest_scale(q.dtype)


def packed_arguments(q: NF4Tensor) -> PackedNF4:
    """Return q for a kernel; it must live until the call."""
    return PackedNF4(*_arguments(q))


def dequantize(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """Return the dense tensor."""
    computed = dtype if dtype in CPU_DTYPES else torch.float32
    out = torch.empty(q.shape, dtype=computed, device=q.device)
    arguments = Dequantize(*_arguments(q), address(out), 0, out.numel())
    dispatch.run("nf4_dequantize", computed, arguments)
    return out if dtype == computed else out.to(dtype)


def panels(q: NF4Tensor, step: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield panels as `dequantize_nf4_panels` does, all in one memory."""
    computed = dtype if dtype in CPU_DTYPES else torch.float32
    N, K = q.shape
    out = torch.empty((step, K), dtype=computed, device=q.device)
    arguments = Dequantize(*_arguments(q), address(out), 0, 0)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        arguments.first = start * K // q.block_size
        arguments.n = (rows.stop - start) * K
        dispatch.run("nf4_dequantize", computed, arguments)
        yield rows, out[: rows.stop - start].to(dtype)


def product(x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """Return x [M, K], fp32 or bf16, times the transpose of q [N, K], plus bias fp32 [N]: [M, N].

    K must be a multiple of the block. The sums are in fp32, and the weight is rounded to x's dtype,
    as `dequantize` rounds it.
    """
    (M, K), N = x.shape, q.shape[0]
    y, x = torch.empty((M, N), dtype=x.dtype, device=x.device), x.contiguous()
    bias = None if bias is None else bias.contiguous()
    arguments = Product(*_arguments(q), *map(address, (x, bias, y)), M, N, K)
    dispatch.run("nf4_product", x.dtype, arguments)
    return y
