"""AdamW on a GPU: all tensors in one launch.

A LoRA adapter is hundreds of tensors of some ten thousand values; a launch for each would take
longer than the arithmetic. The kernel gets a table of addresses, and a list that says which tensor
and which piece of it each program updates. With fp32 state 16 bytes are read and 12 written per
value, once each; with 8-bit state 10 and 6, and 16 more per block of 256. Of a parameter in
bfloat16 the kernel reads and writes both halves (remainder.py), as many bytes as of one in fp32;
its gradient has 2 bytes.

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

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from ..nf4 import ABSMAX_FLOOR
from . import reference
from .clipped import AdamWRow, ClippedAdamW
from .lists import M, Update, Work, changed, work
from .state import BLOCK as BLOCK_8BIT
from .state import Moment8bit, signed_map, unsigned_map

BLOCK, THREADS = 1024, 256  # 4 values a thread
BLOCKS = 8  # of a program that adds up squares
COLUMNS = 10  # of the numbers of a group (clipped.py)
ALIGNMENT = 16  # bytes, of every tensor
ROWS = 8  # blocks of 8-bit state of one program
EXACT = {"enable_fp_fusion": False}


@triton.jit
def _update(
    TENSORS, PIECES, NUMBERS, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tensor, piece = tl.load(PIECES + 2 * program), tl.load(PIECES + 2 * program + 1)
    entry = TENSORS + (6 + HALVES) * tensor
    numbers = NUMBERS + COLUMNS * tl.load(entry + 5 + HALVES)
    if tl.load(numbers + 9) != 0:
        _piece(entry, piece, numbers, BLOCK, HALVES)


@triton.jit
def _piece(entry, piece, numbers, BLOCK: tl.constexpr, HALVES: tl.constexpr):
    P, G, LOW = _addresses(entry, entry + 4, HALVES)
    kind = tl.pointer_type(tl.float32)
    M = tl.multiple_of(tl.load(entry + 2).to(kind), 16)
    V = tl.multiple_of(tl.load(entry + 3).to(kind), 16)
    n = tl.load(entry + 4 + HALVES)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    if piece * BLOCK + BLOCK <= n:
        _values(P, G, M, V, LOW, at, None, numbers, HALVES)
    else:
        _values(P, G, M, V, LOW, at, at < n, numbers, HALVES)


@triton.jit
def _values(P, G, M, V, LOW, at, inside, numbers, HALVES: tl.constexpr):
    p, g = _read(P, LOW, at, inside, HALVES), tl.load(G + at, mask=inside).to(tl.float32)
    m, v = tl.load(M + at, mask=inside), tl.load(V + at, mask=inside)
    p, m, v = _adam(p, g, m, v, numbers)
    _write(p, P, LOW, at, inside, HALVES)
    tl.store(M + at, m, mask=inside)
    tl.store(V + at, v, mask=inside)


@triton.jit
def _addresses(entry, low, HALVES: tl.constexpr):
    """The addresses of p, its gradient, and of its remainder, which only two halves have."""
    if HALVES:
        i16 = tl.pointer_type(tl.int16)
        P, LOW = tl.load(entry).to(i16), tl.multiple_of(tl.load(low).to(i16), 16)
        G = tl.load(entry + 1).to(tl.pointer_type(tl.bfloat16))
    else:
        fp32 = tl.pointer_type(tl.float32)
        P, G = tl.load(entry).to(fp32), tl.load(entry + 1).to(fp32)
        LOW = P
    return tl.multiple_of(P, 16), tl.multiple_of(G, 16), LOW


@triton.jit
def _read(P, LOW, at, inside, HALVES: tl.constexpr):
    """The parameter in fp32, of its two halves or as it is."""
    p = tl.load(P + at, mask=inside)
    if HALVES:
        p = (p.to(tl.int32) << 16) + tl.load(LOW + at, mask=inside).to(tl.int32)
        p = p.to(tl.float32, bitcast=True)
    return p


@triton.jit
def _write(p, P, LOW, at, inside, HALVES: tl.constexpr):
    if HALVES:
        bits = p.to(tl.int32, bitcast=True)
        tl.store(LOW + at, bits.to(tl.int16), mask=inside)
        p = ((bits + 0x8000) >> 16).to(tl.int16)
    tl.store(P + at, p, mask=inside)


@triton.jit
def _adam(p, g, m, v, numbers):
    """The new p, m and v; `numbers` points at a row of `ClippedAdamW.numbers`."""
    decay, beta1, rest1 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    beta2, rest2, rate = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
    correction, eps = tl.load(numbers + 6), tl.load(numbers + 7)
    g = g * tl.load(numbers + 8)
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    p = p * decay - rate * m / (tl.sqrt(v) * correction + eps)
    return p, m, v


@triton.jit
def _update_8bit(
    TENSORS, PIECES, NUMBERS, M_LEVELS, M_EDGES, V_LEVELS, V_EDGES,
    floor: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tensor, piece = tl.load(PIECES + 2 * program), tl.load(PIECES + 2 * program + 1)
    entry = TENSORS + (8 + HALVES) * tensor
    numbers = NUMBERS + COLUMNS * tl.load(entry + 7 + HALVES)
    if tl.load(numbers + 9) != 0:
        _piece_8bit(
            entry, piece, numbers, M_LEVELS, M_EDGES, V_LEVELS, V_EDGES, floor, ROWS, BLOCK, HALVES
        )  # fmt: skip


@triton.jit
def _piece_8bit(
    entry, piece, numbers, M_LEVELS, M_EDGES, V_LEVELS, V_EDGES,
    floor: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    fp32 = tl.pointer_type(tl.float32)
    u8 = tl.pointer_type(tl.uint8)
    start = piece * (ROWS * BLOCK)
    P, G, LOW = _addresses(entry, entry + 6, HALVES)
    M = tl.multiple_of(tl.load(entry + 2).to(u8), 16) + start
    M_ABSMAX = tl.load(entry + 3).to(fp32) + piece * ROWS
    V = tl.multiple_of(tl.load(entry + 4).to(u8), 16) + start
    V_ABSMAX = tl.load(entry + 5).to(fp32) + piece * ROWS
    left = tl.load(entry + 6 + HALVES) - start
    if left >= ROWS * BLOCK:
        _blocks(
            P + start, G + start, LOW + start, M, M_ABSMAX, V, V_ABSMAX, M_LEVELS, M_EDGES,
            V_LEVELS, V_EDGES, left, numbers, floor, True, ROWS, BLOCK, HALVES,
        )  # fmt: skip
    else:
        _blocks(
            P + start, G + start, LOW + start, M, M_ABSMAX, V, V_ABSMAX, M_LEVELS, M_EDGES,
            V_LEVELS, V_EDGES, left.to(tl.int32), numbers, floor, False, ROWS, BLOCK, HALVES,
        )  # fmt: skip


@triton.jit
def _blocks(
    P, G, LOW, M, M_ABSMAX, V, V_ABSMAX, M_LEVELS, M_EDGES, V_LEVELS, V_EDGES, left, numbers,
    floor: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HALVES: tl.constexpr,
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
        P, G, LOW, M, V, low, of_low, m_absmax, v_absmax, M_LEVELS, V_LEVELS, numbers, HALVES
    )  # fmt: skip
    m_high, v_high = _half(
        P, G, LOW, M, V, high, of_high, m_absmax, v_absmax, M_LEVELS, V_LEVELS, numbers, HALVES
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
    P, G, LOW, M, V, at, inside, m_absmax, v_absmax, M_LEVELS, V_LEVELS, numbers,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Update p; the new m and v."""
    p = _read(P, LOW, at, inside, HALVES)
    if inside is None:
        g, m, v = tl.load(G + at), tl.load(M + at), tl.load(V + at)
    else:  # 0 for what is not there, which raises no absmax
        g = tl.load(G + at, mask=inside, other=0.0)
        m, v = tl.load(M + at, mask=inside, other=127), tl.load(V + at, mask=inside, other=0)
    m = tl.load(M_LEVELS + m.to(tl.int32)) * m_absmax
    v = tl.load(V_LEVELS + v.to(tl.int32)) * v_absmax
    p, m, v = _adam(p, g.to(tl.float32), m, v, numbers)
    _write(p, P, LOW, at, inside, HALVES)
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


@triton.jit
def _squares(
    TENSORS, PIECES, SUMS, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, MIXED: tl.constexpr
):  # fmt: skip
    """SUMS: of the squares of each piece of a gradient, which is so many blocks.

    Gradients are fp32; MIXED: some of them are bf16.
    """
    program = tl.program_id(0).to(tl.int64)
    tensor, piece = tl.load(PIECES + 2 * program), tl.load(PIECES + 2 * program + 1)
    address, n = tl.load(TENSORS + 3 * tensor), tl.load(TENSORS + 3 * tensor + 1)
    start = piece * (BLOCK * BLOCKS)
    if MIXED:
        if tl.load(TENSORS + 3 * tensor + 2) == 0:
            total = _sum_of_squares(address, tl.float32, start, n, BLOCK, BLOCKS)
        else:
            total = _sum_of_squares(address, tl.bfloat16, start, n, BLOCK, BLOCKS)
    else:
        total = _sum_of_squares(address, tl.float32, start, n, BLOCK, BLOCKS)
    tl.store(SUMS + program, total)


@triton.jit
def _sum_of_squares(
    address, dtype: tl.constexpr, start, n, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    G = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
    sums = tl.zeros([BLOCK], tl.float32)
    if start + BLOCK * BLOCKS <= n:
        for i in tl.static_range(BLOCKS):
            g = tl.load(G + start + i * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
            sums += g * g
    else:
        for i in range(BLOCKS):
            at = start + i * BLOCK + tl.arange(0, BLOCK)
            g = tl.load(G + at, mask=at < n, other=0.0).to(tl.float32)
            sums += g * g
    return tl.sum(sums)


@triton.jit
def _decide(
    SUMS, PIECES, LOSSES, COUNTERS, BY_STEP, BY_TAKEN, NUMBERS, TOLD, count, losses, groups, steps,
    max_norm, BLOCK: tl.constexpr, ALL_LOSSES: tl.constexpr, ALL_GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: norm and factor, whether the step is taken, its numbers; see clipped.py."""
    begun, taken = tl.load(COUNTERS), tl.load(COUNTERS + 1)
    sums = tl.zeros([BLOCK], tl.float32)
    first = tl.full([BLOCK], 0, tl.int32) + count
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(SUMS + at, mask=at < count, other=0.0)
        sums += x
        first = tl.minimum(first, tl.where(_is_finite(x), count, at))
    norm = tl.sqrt_rn(tl.sum(sums))
    place = tl.min(first)
    at = tl.arange(0, ALL_LOSSES)
    loss = tl.load(LOSSES + at, mask=at < losses, other=0.0)
    fine = _is_finite(norm) & (tl.sum((~_is_finite(loss)).to(tl.int32)) == 0)
    tl.store(TOLD, norm)
    tl.store(TOLD + 1, fine.to(tl.float32))
    tl.store(TOLD + 2, tl.load(PIECES + 2 * place, mask=place < count, other=-1).to(tl.float32))
    tl.store(TOLD + 3 + at, loss, mask=at < losses)

    group = tl.arange(0, ALL_GROUPS)
    inside = group < groups
    row = BY_STEP + 2 * (groups * tl.minimum(begun, steps - 1) + group)
    lr, decay = tl.load(row, mask=inside, other=0.0), tl.load(row + 1, mask=inside, other=0.0)
    row = BY_TAKEN + 2 * (groups * tl.minimum(taken, steps - 1) + group)
    bias, correction = tl.load(row, mask=inside, other=1.0), tl.load(row + 1, mask=inside)
    row = NUMBERS + COLUMNS * group
    tl.store(row, decay.to(tl.float32), mask=inside)
    tl.store(row + 5, (lr / bias).to(tl.float32), mask=inside)
    tl.store(row + 6, correction.to(tl.float32), mask=inside)
    # two roundings, as torch computes max_norm / (norm + 1e-6)
    factor = tl.minimum(tl.div_rn(1.0, norm + 1e-6) * max_norm, 1.0)
    tl.store(row + 8, tl.zeros([ALL_GROUPS], tl.float32) + factor, mask=inside)
    tl.store(row + 9, tl.zeros([ALL_GROUPS], tl.float32) + fine.to(tl.float32), mask=inside)
    tl.debug_barrier()  # no thread counts before all have read the counters
    tl.store(COUNTERS, begun + 1)
    tl.store(COUNTERS + 1, taken + fine.to(tl.int64))


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


def adamw_step(update: Update[Tensor]) -> None:
    """Launch the kernel for fp32 state, for tensors that fit (lists.py)."""
    groups = list(zip(*update.lists, strict=True))
    done = work(groups, BLOCK, numbered=[0] * len(groups))
    _launch_update(done, _uploaded(update))
    changed(update)


def adamw_step_8bit(update: Update[Moment8bit]) -> None:
    """Launch the kernel for 8-bit state, for tensors that fit (lists.py)."""
    groups = [(p, g, *m, *v) for p, g, m, v in zip(*update.lists, strict=True)]
    done = work(groups, ROWS * BLOCK_8BIT, numbered=[0] * len(groups))
    _launch_update_8bit(done, _uploaded(update))
    changed(update)


def _uploaded(update: Update[M]) -> Tensor:
    """Return the numbers of a step on the device, with gradients as they are: fp32 [1, 10]."""
    numbers = torch.tensor([*update.numbers, 1.0, 1.0], dtype=torch.float32, device="cpu")
    return dispatch.sent(numbers, update.params[0].device)


def _launch_update(done: Work, numbers: Tensor, halves: bool = False) -> None:
    if len(done.pieces):
        dispatch.launch(
            _update, (len(done.pieces),), done.tensors, done.pieces, numbers, BLOCK, COLUMNS,
            int(halves), num_warps=THREADS // dispatch.lanes(),
        )  # fmt: skip


def _launch_update_8bit(done: Work, numbers: Tensor, halves: bool = False) -> None:
    device = done.tensors.device
    if len(done.pieces):
        dispatch.launch(
            _update_8bit, (len(done.pieces),), done.tensors, done.pieces, numbers,
            *signed_map(device), *unsigned_map(device), ABSMAX_FLOOR, ROWS, BLOCK_8BIT, COLUMNS,
            int(halves), num_warps=THREADS // dispatch.lanes(), **EXACT,
        )  # fmt: skip


def clipped_step(step: ClippedAdamW, rows: Sequence[AdamWRow], losses: Tensor) -> Tensor:
    """Take a step in three launches, up to three more with several kinds of parameters and state.

    Return what is told of it (clipped.py). The reference updates the tensors that do not fit
    (lists.py).
    """
    ours = [row.fits(ALIGNMENT) for row in rows]
    told = _decided(step, rows, ours, losses)
    taken = [row for row, fit in zip(rows, ours, strict=True) if fit]
    kinds: dict[tuple[bool, bool], list[AdamWRow]] = {}
    for row in taken:
        kinds.setdefault(row.kind, []).append(row)
    for (in_8bit, halves), part in kinds.items():
        name = f"8-bit state {in_8bit}, halves {halves}"
        values, launch = BLOCK, _launch_update
        if in_8bit:
            values, launch = ROWS * BLOCK_8BIT, _launch_update_8bit
        groups = [row.tensors for row in part]
        numbered = [row.group for row in part]
        done = work(groups, values, numbered=numbered, before=step.work.get(name))
        step.work[name] = done
        launch(done, step.numbers, halves)
        torch.autograd.graph.increment_version([t for p, _, *s in groups for t in (p, *s)])
    reference.take(step, [row for row, fit in zip(rows, ours, strict=True) if not fit])
    return told


def _decided(
    step: ClippedAdamW, rows: Sequence[AdamWRow], ours: Sequence[bool], losses: Tensor
) -> Tensor:
    """Launch the squares and what follows from them."""
    # a gradient of another dtype or with strides is copied for its squares; numbers say which are
    # in bfloat16
    grads = [
        row.grad if fit else row.grad.to(torch.float32, copy=True).contiguous()
        for row, fit in zip(rows, ours, strict=True)
    ]
    numbered = [int(g.dtype == torch.bfloat16) for g in grads]
    before = step.work.get("squares")
    done = work([(g,) for g in grads], BLOCK * BLOCKS, numbered=numbered, before=before)
    step.work["squares"] = done
    count, (steps, groups, _) = len(done.pieces), step.by_step.shape
    sums = torch.empty(count, dtype=torch.float32, device=losses.device)
    told = torch.empty(3 + len(losses), dtype=torch.float32, device=losses.device)
    warps = THREADS // dispatch.lanes()
    if count:
        dispatch.launch(
            _squares,
            (count,),
            done.tensors,
            done.pieces,
            sums,
            BLOCK,
            BLOCKS,
            int(any(numbered)),
            num_warps=warps,
        )
    dispatch.launch(
        _decide, (1,), sums, done.pieces, losses, step.counters, step.by_step, step.by_taken,
        step.numbers, told, count, len(losses), groups, steps, step.max_norm, BLOCK,
        triton.next_power_of_2(len(losses)), triton.next_power_of_2(groups), COLUMNS,
        num_warps=warps,
    )  # fmt: skip
    return told
