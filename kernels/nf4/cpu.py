"""The compiled kernels of cpu.cpp, with the signatures of reference.py; tensors in host memory."""

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import CPU_DTYPES, FLOAT, INT64, POINTER

# Values: fp16 (and for the search bf16) is widened to fp32 piece by piece, 4 MB at a time; a
# multiple of every block size. Larger pieces leave larger holes in the heap (docs/dev/LOG.md).
CHUNK = 1 << 20


def quantize(
    flat: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float
) -> tuple[Tensor, Tensor]:
    blocks = -(-flat.numel() // block_size)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    return _codes("nf4_quantize", flat, absmax, thresholds, order, block_size, floor), absmax


def encode(
    flat: Tensor, scales: Tensor, thresholds: Tensor, order: Tensor, block_size: int, floor: float
) -> Tensor:
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
    """The codes of flat; `scales` are read, or written by the op that quantizes."""
    taken = flat.dtype if flat.dtype in CPU_DTYPES else torch.float32
    run = dispatch.function(f"{op}_{CPU_DTYPES[taken]}", *[POINTER] * 5, INT64, INT64, FLOAT)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=flat.device)
    tables = thresholds.data_ptr(), order.data_ptr()
    step = flat.numel() if flat.dtype == taken else CHUNK
    for start in range(0, flat.numel(), max(1, step)):
        x = flat[start : start + step].to(taken)
        places = codes.data_ptr() + start // 2, scales.data_ptr() + 4 * (start // block_size)
        run(x.data_ptr(), *tables, *places, x.numel(), block_size, floor)
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
    run = dispatch.function("nf4_search", *[POINTER] * 6, *[INT64] * 3, FLOAT)
    scales, inverse = absmax.clone(), 1 / factors
    tables = [t.data_ptr() for t in (thresholds, table, factors, inverse)]
    for start in range(0, flat.numel(), CHUNK):
        x = flat[start : start + CHUNK].float()
        place = scales.data_ptr() + 4 * (start // block_size)
        run(x.data_ptr(), *tables, place, len(factors), x.numel(), block_size, floor)
    return scales


def dequantize(
    codes: Tensor, scales: Tensor, table: Tensor, n: int, block_size: int, dtype: torch.dtype
) -> Tensor:
    computed = dtype if dtype in CPU_DTYPES else torch.float32
    op = f"nf4_dequantize_{CPU_DTYPES[computed]}"
    run = dispatch.function(op, *[POINTER] * 4, INT64, INT64)
    out = torch.empty(n, dtype=computed, device=codes.device)
    codes, scales = codes.contiguous(), scales.contiguous()
    pointers = [t.data_ptr() for t in (codes, table, scales, out)]
    run(*pointers, n, block_size)
    return out.to(dtype)
