"""GGUF's blocks in plain torch, on any device; `__init__.py` has the formulas and the layouts."""

import torch
from torch import Tensor

from .fits import (
    LEVELS,
    NOTHING,
    SEARCHES,
    codes_between,
    columns_of,
    constant,
    first_extreme,
    fit_affine,
    fit_levels,
    fit_positive,
    fit_symmetric,
    inverse,
    nearest,
    ordered_sum,
    root,
    signed_extreme,
    truncated,
    weighted_search,
)

CHUNK = 1 << 20  # values at a time: bounds the temporaries to some 100 MB

# ---- blocks of 32 -------------------------------------------------------------------------------


def half_bytes(v: Tensor) -> Tensor:
    """Return [N] in fp16 as bytes [N, 2]."""
    return v.to(torch.float16).view(torch.uint8).view(-1, 2)


def nibbles(q: Tensor) -> Tensor:
    """Pack codes uint8 [..., 2, n], of which the first n become the low halves: [..., n]."""
    return (q[..., 0, :] & 15) | (q[..., 1, :] & 15) << 4


def bits_of(flags: Tensor) -> Tensor:
    """Pack flags uint8 [..., 8], 0 or 1, the first lowest: [...]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (flags << shifts).sum(dim=-1, dtype=torch.uint8)


def block32(block_type: str, parts: list[Tensor], q: Tensor) -> Tensor:
    """Return blocks of 32 values: their fp16 parts [N], and codes uint8 [N, 32]."""
    halves = [half_bytes(part) for part in parts]
    fifth = [bits_of((q >> 4).view(-1, 4, 8))] if "q5" in block_type else []
    return torch.cat([*halves, *fifth, nibbles(q.view(-1, 2, 16))], dim=1)


def quantize_q8_0(x: Tensor) -> Tensor:
    """Return the blocks of x [rows, columns]."""
    x = x.reshape(-1, 32)
    d = x.abs().amax(dim=1) / constant(127, x)
    v = x * inverse(d)[:, None]
    whole = v.abs().floor()
    away = torch.copysign(whole + (v.abs() - whole >= 0.5), v)  # halves away from zero
    return torch.cat([half_bytes(d), truncated(away).view(torch.uint8)], dim=1)


def quantize_plain(x: Tensor, block_type: str) -> Tensor:
    """Return the blocks of x [rows, columns] in q4_0, q4_1, q5_0 or q5_1, by their extremes."""
    x = columns_of(x, 32)
    top = 15 if "q4" in block_type else 31
    if block_type.endswith("_0"):
        half = (top + 1) // 2
        d = signed_extreme(x) / constant(-half, x)
        q, parts = x * inverse(d) + (half + 0.5), [d]
    else:
        lowest, highest = first_extreme(x, torch.lt), first_extreme(x, torch.gt)
        d = (highest - lowest) / constant(top, x)
        q, parts = (x - lowest) * inverse(d) + 0.5, [d, lowest]
    codes = truncated(q).clamp_(max=top).view(torch.uint8)
    return block32(block_type, parts, codes.T.contiguous())


def quantize_fitted(x: Tensor, block_type: str, importance: Tensor | None) -> Tensor:
    """Return the blocks of x [rows, columns] in iq4_nl, or in a type of 32 by importance."""
    if importance is None:
        w = x * x
    elif block_type == "iq4_nl":
        blocks = columns_of(x * x, 32)
        mean = ordered_sum(blocks) * (2.0 / 32)
        w = importance * root(mean.view(len(x), -1).repeat_interleave(32, dim=1) + x * x)
    else:  # the mean square is the row's
        mean = ordered_sum(columns_of(x * x, x.shape[1])) / constant(x.shape[1], x)
        w = importance * root(mean[:, None] + x * x)
    values, weights = columns_of(x, 32), columns_of(w, 32)
    if block_type == "iq4_nl":
        scale, q = fit_levels(values, weights)
        parts = [scale]
    elif block_type.endswith("_0"):
        scale, q = fit_symmetric(values, weights, 8 if "q4" in block_type else 16)
        parts = [scale]
    else:
        scale, low, q = fit_affine(values, weights, weighted_search(block_type))
        parts = [scale, -low]
    return block32(block_type, parts, q.T.to(torch.uint8).contiguous())


# ---- blocks of 256 ------------------------------------------------------------------------------


def quantize_affine_k(x: Tensor, block_type: str, importance: Tensor | None) -> Tensor:
    """Return the blocks of x [rows, columns] in q4_k or q5_k."""
    N, values = x.numel() // 256, columns_of(x, 32)
    if importance is None:
        mean = root(ordered_sum(values * values) / constant(32, x))
        search = SEARCHES[block_type]
        scale, low, q = fit_affine(values, mean + values.abs(), search)
        d, s = _by_the_largest(scale.view(N, 8))
        dmin, m = _by_the_largest(low.view(N, 8))
    else:
        squares = ordered_sum(columns_of(x * x, 256))
        mean = (constant(2, x) * squares / constant(256, x)).repeat_interleave(8)
        w = columns_of(importance.expand_as(x), 32) * root(mean + values * values)
        search = weighted_search(block_type)
        scale, low, q = fit_affine(values, w, search)
        sums = ordered_sum(w).view(N, 8).T
        (d, s), (dmin, m) = (fit_positive(t.view(N, 8).T, sums, 63) for t in (scale, low))
        s, m = s.T, m.T
        if block_type == "q5_k":
            s, m = s.clamp(max=63), m.clamp(max=63)
    packed = _packed6(s, m)
    s, m = _unpacked6(packed)  # q4_k lets numbers beyond 63 run into others
    step = (d.half().float()[:, None] * s).view(-1)
    base = (dmin.half().float()[:, None] * m).view(-1)
    again = codes_between((values + base) / step, 0, search.top)
    q = torch.where(step != 0, again, q).T.to(torch.uint8).contiguous()
    fifth = [bits_of((q >> 4).view(N, 8, 32).mT)] if block_type == "q5_k" else []
    low4 = nibbles(q.view(N, 4, 2, 32)).view(N, 128)
    return torch.cat([half_bytes(d), half_bytes(dmin), packed, *fifth, low4], dim=1)


def _by_the_largest(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return a step [N] for v [N, 8], a 63rd of the largest, and v in steps, uint8 [N, 8]."""
    largest = torch.zeros_like(v[:, 0])
    for column in v.T:
        largest = torch.where(column > largest, column, largest)
    over = torch.where(largest > 0, constant(63, v) / largest, 0)
    steps = nearest(over[:, None] * v).to(torch.uint8).clamp_(max=63)
    return largest / constant(63, v), steps


def _packed6(s: Tensor, m: Tensor) -> Tensor:
    """Pack 6-bit numbers uint8 [N, 8] and [N, 8] into bytes [N, 12]."""
    first = s[:, :4] | (s[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    return torch.cat([first, second, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], dim=1)


def _unpacked6(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers that `_packed6` packed, uint8 [N, 8] and [N, 8]."""
    first, second, third = packed.split(4, dim=1)
    s = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], dim=1)
    return s, torch.cat([second & 63, third >> 4 | (second >> 6) << 4], dim=1)


def quantize_q6_k(x: Tensor, importance: Tensor | None) -> Tensor:
    """Return the blocks of x [rows, columns]."""
    N, values = x.numel() // 256, columns_of(x, 16)
    w = values * values if importance is None else columns_of(importance.expand_as(x), 16)
    scale, q = fit_symmetric(values, w, 32)
    scale = scale.view(N, 16)
    extreme = signed_extreme(scale.T)
    over = constant(-128, x) / extreme
    d = constant(1, x) / over
    s = nearest(over[:, None] * scale).clamp_(max=127).to(torch.int8)
    step = (d.half().float()[:, None] * s).view(-1)
    q = torch.where(step != 0, codes_between(values / step, -32, 31) + 32, q)
    q = q.T.to(torch.uint8).contiguous()
    low4 = nibbles(q.view(N, 2, 2, 64)).view(N, 128)  # rows 0 and 1 of a half low, 2 and 3 high
    high = (q >> 4).view(N, 2, 4, 32)
    high2 = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = [low4, high2.view(N, 64), s.view(torch.uint8), half_bytes(d)]
    return torch.cat(parts, dim=1).masked_fill_((extreme.abs() < NOTHING)[:, None], 0)


# ---- mxfp4 --------------------------------------------------------------------------------------

LEVELS4 = (0, 1, 2, 3, 4, 6, 8, 12)  # of codes 0 to 7, in halves; 8 to 15 are their negatives
BETWEEN = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)  # a value there takes the smaller level


def quantize_mxfp4(x: Tensor) -> Tensor:
    """Return the blocks of x [rows, columns]; the largest value has an exponent of 2 in its block.

    It may lie above the largest level, 6 of 4 to 8, and is 6 then: so do llama.cpp and the OCP.
    """
    x = x.reshape(-1, 32)
    largest = x.abs().amax(dim=1)
    _, exponent = largest.frexp()  # of a fraction in [0.5, 1)
    e = (exponent - 3 + 127).clamp_(0, 254).masked_fill_(largest == 0, 0)
    halves = torch.ldexp(x.abs().double(), 128 - e[:, None]).contiguous()
    q = torch.bucketize(halves, torch.tensor(BETWEEN, dtype=torch.float64, device=x.device))
    q = (q + 8 * ((x < 0) & (q > 0))).to(torch.uint8)
    return torch.cat([e.to(torch.uint8)[:, None], nibbles(q.view(-1, 2, 16))], dim=1)


def _values_mxfp4(blocks: Tensor) -> Tensor:
    e, low4 = blocks.split([1, 16], dim=1)
    levels = torch.tensor([*LEVELS4, *(-each for each in LEVELS4)], device=e.device)
    values = levels.double()[spread(low4, 4).view(-1, 32).int()]
    return torch.ldexp(values, e.int() - 128).float()


# ---- whole matrices -----------------------------------------------------------------------------


def quantize(w: Tensor, block_type: str, importance: Tensor | None) -> Tensor:
    """Return the blocks of w [rows, columns], uint8 [rows, bytes]."""
    pieces = w.split(max(1, CHUNK // w.shape[1]))
    return torch.cat([_quantize(piece.float(), block_type, importance) for piece in pieces])


def _quantize(x: Tensor, block_type: str, importance: Tensor | None) -> Tensor:
    if block_type == "q6_k":
        blocks = quantize_q6_k(x, importance)
    elif block_type.endswith("_k"):
        blocks = quantize_affine_k(x, block_type, importance)
    elif block_type == "q8_0":
        blocks = quantize_q8_0(x)
    elif block_type == "mxfp4":
        blocks = quantize_mxfp4(x)
    elif importance is None and block_type != "iq4_nl":
        blocks = quantize_plain(x, block_type)
    else:
        blocks = quantize_fitted(x, block_type, importance)
    return blocks.reshape(len(x), -1)


def dequantize(blocks: Tensor, block_type: str, dtype: torch.dtype) -> Tensor:
    """Return the values of blocks uint8 [rows, bytes]: [rows, columns]."""
    pieces = blocks.split(max(1, CHUNK // blocks.shape[1]))
    return torch.cat([_dequantize(piece, block_type).to(dtype) for piece in pieces])


def _dequantize(blocks: Tensor, block_type: str) -> Tensor:
    if block_type == "q6_k":
        values = _values_q6_k(blocks.reshape(-1, 210))
    elif block_type.endswith("_k"):
        values = _values_affine_k(blocks.reshape(-1, 144 if block_type == "q4_k" else 176))
    elif block_type == "q8_0":
        d, q = blocks.reshape(-1, 34).split([2, 32], dim=1)
        values = halves_of(d) * q.view(torch.int8)
    elif block_type == "mxfp4":
        values = _values_mxfp4(blocks.reshape(-1, 17))
    else:
        values = _values32(blocks, block_type)
    return values.reshape(len(blocks), -1)


def halves_of(data: Tensor) -> Tensor:
    """Return bytes [N, 2] as fp16 in fp32, [N, 1]."""
    return data.contiguous().view(torch.float16).float()


def spread(data: Tensor, bits: int) -> Tensor:
    """Return numbers of `bits` bits from bytes uint8 [N, ..., n], lowest first: [N, ..., k, n]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    return data[..., None, :] >> shifts[:, None] & (1 << bits) - 1


def _fifth(data: Tensor) -> Tensor:
    """Return the fifth bits of bytes [N, 4] as 0 or 16, [N, 32]."""
    return spread(data, 1).mT.reshape(-1, 32) << 4


def _values32(blocks: Tensor, block_type: str) -> Tensor:
    affine, five = block_type.endswith("_1"), "q5" in block_type
    parts = [2] * (1 + affine) + [4] * five + [16]
    *head, low4 = blocks.reshape(-1, sum(parts)).split(parts, dim=1)
    q = spread(low4, 4).view(-1, 32)
    if five:
        q = q | _fifth(head.pop())
    d, *m = map(halves_of, head)
    if block_type == "iq4_nl":
        return d * torch.tensor(LEVELS, dtype=torch.float32, device=q.device)[q.int()]
    return d * q + m[0] if affine else d * (q.float() - (16 if five else 8))


def _values_affine_k(blocks: Tensor) -> Tensor:
    N, five = len(blocks), blocks.shape[1] == 176
    d, dmin, packed, *fifth, low4 = blocks.split([2, 2, 12, *[32] * five, 128], dim=1)
    s, m = _unpacked6(packed)
    q = spread(low4.view(N, 4, 32), 4).view(N, 8, 32)
    if five:
        q = q | spread(fifth[0], 1) << 4
    return (halves_of(d) * s)[:, :, None] * q - (halves_of(dmin) * m)[:, :, None]


def _values_q6_k(blocks: Tensor) -> Tensor:
    N = len(blocks)
    low4, high2, s, d = blocks.split([128, 64, 16, 2], dim=1)
    q = spread(low4.view(N, 2, 64), 4).view(N, 2, 4, 32) | spread(high2.view(N, 2, 32), 2) << 4
    return (halves_of(d) * s.view(torch.int8))[:, :, None] * (q.view(N, 16, 16).float() - 32)
