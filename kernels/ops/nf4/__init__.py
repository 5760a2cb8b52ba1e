"""NF4: 4-bit NormalFloat with double quantization (QLoRA, arXiv:2305.14314, section 3); and FP4.

The maths
---------
The tensor is flattened row-major and cut into blocks of `block_size` values; the last block may be
short. A block is scaled by its largest magnitude, absmax, and every value becomes the index of the
nearest of 16 fixed levels, the quantiles of a normal distribution rescaled to [-1, 1] so that 0 and
both ends are exact:

    scaled = x * (1 / absmax)              fp32, a product with the reciprocal
    i      = #{thresholds < scaled}        thresholds are the fp32 midpoints of the sorted levels
    code   = order[i]                      NF4: i itself; FP4's codes are not sorted
    x'     = levels[code] * absmax         fp32, then one rounding to the wanted dtype

Double quantization stores absmax itself in 8 bits. With offset = mean(absmax), the residue
absmax - offset is quantized in blocks of 256 to the nearest of 256 levels of a signed "dynamic" map
(arXiv:1511.04561: some bits hold a decimal exponent, the rest a linear fraction):

    absmax' = DYNAMIC[absmax_code] * nested_absmax[block // 256] + offset

which costs 8 / block_size + 32 / (256 block_size) bits per parameter instead of 32 / block_size:
0.127 instead of 0.5 at 64.

Better scales
-------------
absmax is not the scale with the least error. `search_scales` tries FACTORS of it, from 3/4 to 3/2,
and keeps for every block the one that minimises the squared error. A smaller scale gives up the
largest value for finer levels; a larger one puts it on a level below 1. After double quantization
the codes are chosen again, for the scales that the reader will see. The format does not change, so
that a better scale costs nothing later; quantizing takes some 15 times as long.

Memory layout
-------------
    codes          uint8 [ceil(n / 2)]     element 2i in the high nibble of byte i, 2i + 1 low
    absmax         uint8 [blocks], or fp32 [blocks] without double quantization
    nested_absmax  fp32 [ceil(blocks / 256)]
    offset         fp32 [1]

These are bitsandbytes' bytes, so that its checkpoints need no conversion (`tensor.py`). The padding
nibble of an odd length is the code of 0, which all-zero blocks, of absmax 0, have everywhere.

The trade-off
-------------
To multiply many rows by such a weight, it is dequantized first and forgotten afterwards. A few rows
are multiplied by it as it is packed (`frozen_linear`).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch
from . import cpu, reference
from .tensor import (
    LEVELS,
    NESTED_BLOCK,
    NF4Tensor,
    check_block_size,
    dynamic_map,
    largest_scale,
    levels,
    pairs,
)

# A smaller absmax divides as if it were this, so that 1 / absmax stays finite (bitsandbytes' rule).
ABSMAX_FLOOR = 1e-38
PART = 1 << 26  # values that are sent at a time to be packed, 128 MB in 16 bits
ALIGNMENT = 16  # bytes, of codes that are read by their address
# Of absmax. On the weights of SmolLM2 half the step gains 0.7 % of the squared error, and a wider
# range nothing (docs/dev/LOG.md). 1 comes first: of equally good ones the first is kept.
FACTORS = (1.0, *(k / 32 for k in range(24, 49) if k != 32))


@functools.cache
def thresholds(quant_type: str, device: torch.device) -> Tensor:
    """Return where the nearest level changes, fp32 [15].

    These are the midpoints of neighbours, rounded to fp32 once.
    """
    table = levels(quant_type, device).sort().values
    return (table[1:] + table[:-1]) / 2


@functools.cache
def order(quant_type: str, device: torch.device) -> Tensor:
    """Return the codes by ascending level, uint8 [16]; of FP4's two zeros, 0 before 8."""
    table = LEVELS[quant_type]
    return torch.tensor(sorted(range(16), key=table.__getitem__), dtype=torch.uint8, device=device)


@functools.cache
def middles(device: torch.device) -> Tensor:
    """Return where the nearest level of the dynamic map changes, fp32 [255]."""
    table = dynamic_map(device)
    return (table[1:] + table[:-1]) / 2


def quantize_nf4(
    w: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    search_scales: bool = False,
    device: torch.device | None = None,
) -> NF4Tensor:
    """Quantize a tensor to NF4, 4-bit NormalFloat (arXiv:2305.14314, section 3).

    Args:
        w: the tensor, fp32, bf16 or fp16, of any shape and strides.
        block_size: how many values share a scale, a power of two from 32 to 4096.
        double_quant: whether the scales are stored in 8 bits.
        search_scales: whether to look for the scale of every block that minimises the squared
            error, instead of its largest magnitude.
        device: where to pack; None for the device of `w`. A large matrix is sent there some rows at
            a time.

    Returns:
        The packed tensor, in new memory on that device.

    Raises:
        ValueError: `w` has another dtype, or NaN or infinite values, which have no scale; or
            `block_size` is another number.
    """
    return _quantize(w, "nf4", block_size, double_quant, search_scales, device or w.device)


def quantize_fp4(
    w: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    search_scales: bool = False,
    device: torch.device | None = None,
) -> NF4Tensor:
    """Quantize a tensor to FP4, the 4-bit float of bitsandbytes.

    Its error is larger than that of `quantize_nf4` (docs/quantization.md).

    Args:
        w: the tensor, fp32, bf16 or fp16, of any shape and strides.
        block_size: how many values share a scale, a power of two from 32 to 4096.
        double_quant: whether the scales are stored in 8 bits.
        search_scales: as in `quantize_nf4`.
        device: as in `quantize_nf4`.

    Returns:
        The packed tensor, in new memory on that device.

    Raises:
        ValueError: as `quantize_nf4` does.
    """
    return _quantize(w, "fp4", block_size, double_quant, search_scales, device or w.device)


def _quantize(
    w: Tensor,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    search_scales: bool,
    device: torch.device,
) -> NF4Tensor:
    if w.dtype not in dispatch.FLOATS:
        raise ValueError(f"4 bits hold float32, bfloat16 or float16 tensors, not {w.dtype}")
    check_block_size(block_size)
    backend = dispatch.backend(__package__, device)
    bounds, codes_by_level = thresholds(quant_type, device), order(quant_type, device)
    sent = functools.partial(_flat, device=device)
    given = bounds, codes_by_level, block_size, ABSMAX_FLOOR
    if search_scales:  # which reads all values twice more
        flat = sent(w)
        codes, absmax = backend.quantize(flat, *given)
    else:
        found = [backend.quantize(sent(part), *given) for part in _parts(w, block_size, device)]
        codes, absmax = map(_joined, zip(*found, strict=True))
        del found
    if absmax.numel() and not torch.isfinite(absmax.amax()):  # NaN counts as the largest there
        raise ValueError("cannot quantize a tensor that holds NaN or infinite values")
    if search_scales:
        table = levels(quant_type, device)[codes_by_level.long()]
        factors = torch.tensor(FACTORS, dtype=torch.float32, device=device)
        better = backend.search(flat, absmax, bounds, table, factors, block_size, ABSMAX_FLOOR)
        absmax = torch.where(better > torch.finfo(w.dtype).max, absmax, better)
    nested = offset = None
    if double_quant:
        offset = reference.mean_absmax(absmax) if len(absmax) else absmax.new_zeros(1)
        quantize = cpu.quantize_absmax if backend is cpu else reference.quantize_absmax
        absmax, nested = quantize(absmax, offset, middles(device), ABSMAX_FLOOR)
    q = NF4Tensor(codes, absmax, nested, offset, tuple(w.shape), block_size, w.dtype, quant_type)
    if search_scales:
        scales = block_scales(q)
        codes = backend.encode(flat, scales, bounds, codes_by_level, block_size, ABSMAX_FLOOR)
        q = replace(q, codes=codes)
    return q


def _parts(w: Tensor, block_size: int, device: torch.device) -> Sequence[Tensor]:
    """Return the rows of w in parts that are sent one by one: whole blocks, PART values or less."""
    if w.device == device or w.numel() <= PART or w.dim() != 2 or w.shape[1] % block_size:
        return [w]
    return w.split(max(1, PART // w.shape[1]))


def _flat(w: Tensor, device: torch.device) -> Tensor:
    """Return w on a device, its values side by side; reshape alone may keep the strides."""
    return w.detach().to(device).reshape(-1).contiguous()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make a tensor in NF4 or FP4 dense (arXiv:2305.14314, section 3).

    Args:
        q: the packed tensor.
        dtype: of the result; the original's if it is None.

    Returns:
        The dense tensor of shape `q.shape`, in new memory on every call.
    """
    if dispatch.traces():
        return dispatch.traced().dequantize_nf4(q, dtype)
    return dense_nf4(q, dtype)


def dense_nf4(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return what `dequantize_nf4` does, for callers that are no part of a graph."""
    backend, dtype = dispatch.backend(__package__, q.codes.device), dtype or q.dtype
    if backend is not reference:
        return backend.dequantize(q, dtype)
    both, n = pairs(q.quant_type, q.device), math.prod(q.shape)
    flat = reference.dequantize(q.codes, block_scales(q), both, n, q.block_size, dtype)
    return flat.view(q.shape)


def addressed(q: NF4Tensor) -> bool:
    """Return whether a kernel can read q by the addresses of its parts."""
    return q.codes.data_ptr() % ALIGNMENT == 0


def dequantize_nf4_each(packed: Sequence[NF4Tensor], dtype: torch.dtype) -> Tensor:
    """Return tensors that differ in values alone, dense and one after the other, [E, *shape].

    On a GPU one launch makes all of them dense. Each must be `addressed`.
    """
    first = packed[0]
    if dispatch.pick(first.device, "cpu", "triton") != "triton":
        return torch.stack([dequantize_nf4(q, dtype) for q in packed])
    from . import triton

    return triton.dequantize_each(packed, dtype)


def dequantize_nf4_rows(q: NF4Tensor, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the rows of a matrix q [N, K] that `rows` int64 [...] picks: [..., K].

    Only these are dequantized. Raises IndexError for a row that is not there; the Triton kernel,
    which does not wait for the device to find out, makes it NaN instead.
    """
    if dispatch.traces():
        return dispatch.traced().dequantize_nf4_rows(q, rows, dtype)
    N, K = q.shape
    if K % q.block_size == 0 and dispatch.pick(q.device, "cpu", "triton") == "triton":
        from . import triton

        flat = triton.dequantize_rows(q, rows.reshape(-1), dtype or q.dtype)
        return flat.view(*rows.shape, K)
    if K % q.block_size:  # rows begin inside of blocks: find each value by itself
        starts = torch.arange(N, device=q.device)[:, None] * K
        at = F.embedding(rows, starts) + torch.arange(K, device=q.device)
        table = levels(q.quant_type, q.device)
        dense = reference.dequantize_at(q.codes, block_scales(q, at // q.block_size), table, at)
        return dense.to(dtype or q.dtype)
    per_row = K // q.block_size
    codes = F.embedding(rows, q.codes.view(N, K // 2))
    blocks = rows[..., None] * per_row + torch.arange(per_row, device=q.device)
    scales = block_scales(q, blocks).view(-1)
    return dense_nf4(_with_scales(q, codes.view(-1), scales, (*rows.shape, K)), dtype)


def dequantize_nf4_panels(
    q: NF4Tensor, step: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a matrix q [N, K], `step` at a time: which rows, and these, [rows, K].

    `step` rows must be whole blocks. On a CPU all panels share one memory: each holds until the
    next is asked for.
    """
    if dispatch.backend(__package__, q.device) is cpu:
        yield from cpu.panels(q, step, dtype)
        return
    N, K = q.shape
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        blocks = slice(start * K // q.block_size, -(-rows.stop * K // q.block_size))
        codes = q.codes.view(-1)[start * K // 2 : -(-rows.stop * K // 2)]
        scales = block_scales(q, torch.arange(blocks.start, blocks.stop, device=q.device))
        panel = _with_scales(q, codes, scales, (rows.stop - start, K))
        yield rows, dense_nf4(panel, dtype)


def _with_scales(q: NF4Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, ...]) -> NF4Tensor:
    """Return a part of q: its codes, its scales in fp32, and its shape."""
    return replace(q, codes=codes, absmax=scales, nested_absmax=None, offset=None, shape=shape)


def block_scales(q: NF4Tensor, blocks: Tensor | None = None) -> Tensor:
    """Return the scales of `blocks` int64 [...], or of all, fp32 [...]."""
    codes, nested = q.absmax, q.nested_absmax
    if nested is None or q.offset is None:
        return codes if blocks is None else codes[blocks]
    if blocks is None:
        nested = nested.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    else:
        codes, nested = codes[blocks], nested[blocks // NESTED_BLOCK]
    scales = reference.dequantize_absmax(codes, nested, q.offset, dynamic_map(q.device))
    return scales.clamp_(max=largest_scale(q.dtype))
