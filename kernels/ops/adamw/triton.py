"""AdamW on a GPU: all tensors in one launch.

A LoRA adapter is hundreds of tensors of some ten thousand values; a launch for each would take
longer than the arithmetic. The kernel gets a table of addresses, and a list that says which tensor
and which piece of it each program updates. With fp32 state 16 bytes are read and 12 written per
value, once each; with 8-bit state 10 and 6, and 16 more per block of 256.

8-bit state
-----------
A warp takes whole blocks, as two halves of which a thread holds 4 values: 128-bit accesses of p and
g, 32-bit ones of the codes, and no waiting for other warps to know absmax. It is the largest bit
pattern of |x|, which orders like the numbers and puts NaN on top.

The code of x is the number of edges below it. A search would be 8 loads that wait for each other.
But the edges are nearly equidistant within a decade: with 2^i parts in decade i, the edge numbered
2^i - 1 + j lies close to (0.1 + 0.9 j / 2^i) * 10^(i-6), so that within the decade the number of
the edge next to x is, rounded,

    x * 2^i * 10^(6-i) / 0.9 + 2^i * 8/9 - 1                  (unsigned: twice the parts, - 2)

These seven lines form a concave function, so that it is their minimum, wherever x lies: no decade
is looked for. Every edge is at least 1/4 of a step away from where the rounding turns to its
neighbour. So all edges before the found one are below x, all after it are above x, and one
comparison with the exact value of the found edge, looked up, decides.

The state is bit for bit the reference's, which needs products and sums that are not contracted into
one rounding. p has the GPU's faster square root and division, off by a few units in the last place.
"""

import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from ..nf4 import ABSMAX_FLOOR
from .lists import Update, changed, numbers, work
from .state import BLOCK as BLOCK_8BIT
from .state import Moment8bit, signed_map, unsigned_map

BLOCK, THREADS = 1024, 256  # 4 values a thread
ALIGNMENT = 16  # bytes, of every tensor
ROWS = 8  # blocks of 8-bit state of one program
EXACT = {"enable_fp_fusion": False}


@triton.jit
def _update(
    TENSORS, PIECES, decay, beta1, rest1, beta2, rest2, rate, correction, eps, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    tensor, piece = tl.load(PIECES + 2 * program), tl.load(PIECES + 2 * program + 1)
    entry = TENSORS + 5 * tensor
    kind = tl.pointer_type(tl.float32)
    P = tl.multiple_of(tl.load(entry).to(kind), 16)
    G = tl.multiple_of(tl.load(entry + 1).to(kind), 16)
    M = tl.multiple_of(tl.load(entry + 2).to(kind), 16)
    V = tl.multiple_of(tl.load(entry + 3).to(kind), 16)
    n = tl.load(entry + 4)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    if piece * BLOCK + BLOCK <= n:
        p, m, v = _adam(
            tl.load(P + at), tl.load(G + at), tl.load(M + at), tl.load(V + at),
            decay, beta1, rest1, beta2, rest2, rate, correction, eps,
        )  # fmt: skip
        tl.store(P + at, p)
        tl.store(M + at, m)
        tl.store(V + at, v)
    else:
        inside = at < n
        p, m, v = _adam(
            tl.load(P + at, mask=inside), tl.load(G + at, mask=inside),
            tl.load(M + at, mask=inside), tl.load(V + at, mask=inside),
            decay, beta1, rest1, beta2, rest2, rate, correction, eps,
        )  # fmt: skip
        tl.store(P + at, p, mask=inside)
        tl.store(M + at, m, mask=inside)
        tl.store(V + at, v, mask=inside)


@triton.jit
def _adam(p, g, m, v, decay, beta1, rest1, beta2, rest2, rate, correction, eps):
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    p = p * decay - rate * m / (tl.sqrt(v) * correction + eps)
    return p, m, v


@triton.jit
def _update_8bit(
    TENSORS, PIECES, M_LEVELS, M_EDGES, V_LEVELS, V_EDGES,
    decay, beta1, rest1, beta2, rest2, rate, correction, eps,
    floor: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tensor, piece = tl.load(PIECES + 2 * program), tl.load(PIECES + 2 * program + 1)
    entry = TENSORS + 7 * tensor
    fp32 = tl.pointer_type(tl.float32)
    u8 = tl.pointer_type(tl.uint8)
    start = piece * (ROWS * BLOCK)
    P = tl.multiple_of(tl.load(entry).to(fp32), 16) + start
    G = tl.multiple_of(tl.load(entry + 1).to(fp32), 16) + start
    M = tl.multiple_of(tl.load(entry + 2).to(u8), 16) + start
    M_ABSMAX = tl.load(entry + 3).to(fp32) + piece * ROWS
    V = tl.multiple_of(tl.load(entry + 4).to(u8), 16) + start
    V_ABSMAX = tl.load(entry + 5).to(fp32) + piece * ROWS
    left = tl.load(entry + 6) - start
    if left >= ROWS * BLOCK:
        _blocks(
            P, G, M, M_ABSMAX, V, V_ABSMAX, M_LEVELS, M_EDGES, V_LEVELS, V_EDGES, left,
            decay, beta1, rest1, beta2, rest2, rate, correction, eps, floor, True, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _blocks(
            P, G, M, M_ABSMAX, V, V_ABSMAX, M_LEVELS, M_EDGES, V_LEVELS, V_EDGES, left.to(tl.int32),
            decay, beta1, rest1, beta2, rest2, rate, correction, eps, floor, False, ROWS, BLOCK,
        )  # fmt: skip


@triton.jit
def _blocks(
    P, G, M, M_ABSMAX, V, V_ABSMAX, M_LEVELS, M_EDGES, V_LEVELS, V_EDGES, left,
    decay, beta1, rest1, beta2, rest2, rate, correction, eps,
    floor: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    low = row * BLOCK + tl.arange(0, BLOCK // 2)[None, :]
    high = low + BLOCK // 2
    if WHOLE:
        of_row, of_low, of_high = None, None, None
    else:
        of_row, of_low, of_high = row * BLOCK < left, low < left, high < left
    m_absmax, v_absmax = tl.load(M_ABSMAX + row, mask=of_row), tl.load(V_ABSMAX + row, mask=of_row)
    m_low, v_low = _half(
        P, G, M, V, low, of_low, m_absmax, v_absmax, M_LEVELS, V_LEVELS,
        decay, beta1, rest1, beta2, rest2, rate, correction, eps,
    )  # fmt: skip
    m_high, v_high = _half(
        P, G, M, V, high, of_high, m_absmax, v_absmax, M_LEVELS, V_LEVELS,
        decay, beta1, rest1, beta2, rest2, rate, correction, eps,
    )  # fmt: skip
    m_absmax, v_absmax = _absmax(m_low, m_high), _absmax(v_low, v_high)
    over_m, over_v = _over(m_absmax, floor), _over(v_absmax, floor)
    tl.store(M + low, _code(m_low * over_m, M_EDGES, True), mask=of_low)
    tl.store(V + low, _code(v_low * over_v, V_EDGES, False), mask=of_low)
    tl.store(M + high, _code(m_high * over_m, M_EDGES, True), mask=of_high)
    tl.store(V + high, _code(v_high * over_v, V_EDGES, False), mask=of_high)
    tl.store(M_ABSMAX + row, m_absmax, mask=of_row)
    tl.store(V_ABSMAX + row, v_absmax, mask=of_row)


@triton.jit
def _half(
    P, G, M, V, at, inside, m_absmax, v_absmax, M_LEVELS, V_LEVELS,
    decay, beta1, rest1, beta2, rest2, rate, correction, eps,
):  # fmt: skip
    """Update p; the new m and v."""
    if inside is None:
        p, g, m, v = tl.load(P + at), tl.load(G + at), tl.load(M + at), tl.load(V + at)
    else:  # 0 for what is not there, which raises no absmax
        p, g = tl.load(P + at, mask=inside, other=0.0), tl.load(G + at, mask=inside, other=0.0)
        m, v = tl.load(M + at, mask=inside, other=127), tl.load(V + at, mask=inside, other=0)
    m = tl.load(M_LEVELS + m.to(tl.int32)) * m_absmax
    v = tl.load(V_LEVELS + v.to(tl.int32)) * v_absmax
    p, m, v = _adam(p, g, m, v, decay, beta1, rest1, beta2, rest2, rate, correction, eps)
    tl.store(P + at, p, mask=inside)
    return m, v


@triton.jit
def _absmax(low, high):
    bits = tl.maximum(_bits(low), _bits(high))
    return tl.max(bits, axis=1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _over(absmax, floor: tl.constexpr):
    return tl.div_rn(1.0, tl.where(absmax < floor, floor, absmax))


@triton.jit
def _code(x, EDGES, SIGNED: tl.constexpr):
    parts: tl.constexpr = 1 if SIGNED else 2  # of the lowest decade
    middle: tl.constexpr = 128 if SIGNED else 1  # place in EDGES of the edge numbered 0
    size = tl.abs(x)
    edge = tl.full(x.shape, 255.5 - middle, tl.float32)  # beyond it lies nothing but NaN
    for i in tl.static_range(7):
        slope = parts * 2**i * 10 ** (6 - i) / 0.9
        edge = tl.minimum(edge, tl.fma(size, slope, parts * 2**i * 8 / 9 - parts + 0.5))
    edge = (middle + (tl.where(x < 0, -edge, edge) if SIGNED else edge)).to(tl.int32)
    return (edge - (x <= tl.load(EDGES + edge)).to(tl.int32)).to(tl.uint8)


def adamw_step(update: Update[Tensor]) -> None:
    """Launch the kernel for fp32 state, for tensors that fit (lists.py)."""
    table, pieces = work(list(zip(*update.lists, strict=True)), BLOCK)
    if len(pieces):
        _update[(len(pieces),)](
            table, pieces, *numbers(update.options), BLOCK,
            num_warps=THREADS // dispatch.lanes(),
        )  # fmt: skip
    changed(update)


def adamw_step_8bit(update: Update[Moment8bit]) -> None:
    """Launch the kernel for 8-bit state, for tensors that fit (lists.py)."""
    groups = [(p, g, *m, *v) for p, g, m, v in zip(*update.lists, strict=True)]
    table, pieces = work(groups, ROWS * BLOCK_8BIT)
    device = update.params[0].device
    if len(pieces):
        _update_8bit[(len(pieces),)](
            table, pieces, *signed_map(device), *unsigned_map(device),
            *numbers(update.options), ABSMAX_FLOOR, ROWS, BLOCK_8BIT,
            num_warps=THREADS // dispatch.lanes(), **EXACT,
        )  # fmt: skip
    changed(update)
