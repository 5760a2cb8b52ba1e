"""SwiGLU and GeGLU on a GPU: 1024 values a program, fp32 inside.

Contiguous tensors are one row. Others, such as gate and up in one memory, are rows that lie apart,
of which a grid has at most 65,535.

With a = act(gate), and a' its slope,

    y = a up          d gate = dy up a'          d up = dy a

    silu:  a = z s(z)                 a' = s(z) (1 + z (1 - s(z)))           s the sigmoid
    gelu:  a = z P(z)                 a' = P(z) + z p(z)                     P and p of the normal
    tanh:  a = z s                    a' = s + 2 z s (1 - s) u'              s = s(2 u(z))
    oai:   a = c s(1.702 c)           a' = s (1 + 1.702 c (1 - s))           c = min(z, 7)

where up is replaced by 1 + up, between -7 and 7, in the last, and slopes beyond the bounds are 0.
The third is z (1 + tanh u) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3). Backward keeps gate
and up only. A caller to whom these and the gradient belong gets the results in their places, and y
as well, so that it need not keep y (`lora_mlp`).

Low-rank updates, z + low wide, may still be to be added to gate, up and dy. A kernel of tiles adds
them to what it reads, in fp32: the sums are neither written nor rounded. Forward and backward both
do that, so that gate and up can be kept without them. To add them to gate and up before would read
and write both once more, for one product of depth r.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from .updates import Update, Updates

BLOCK, THREADS = 1024, 128
TILE_ROWS, TILE_COLUMNS, TILE_THREADS = 32, 128, 256  # of a program that adds updates


@triton.jit
def _activate(z, HIDDEN_ACT: tl.constexpr):
    """The activation and its slope at z, fp32."""
    if HIDDEN_ACT == "silu":
        s = tl.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    elif HIDDEN_ACT == "gelu":
        half = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return z * half, half + z * density
    elif HIDDEN_ACT == "swiglu_oai":
        c = tl.where(z > 7.0, 7.0, z)
        s = tl.sigmoid(1.702 * c)
        return c * s, tl.where(z > 7.0, 0.0, s * (1 + 1.702 * c * (1 - s)))
    else:
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * z * z)
        e = tl.exp(-2 * tl.abs(u))  # s and s (1 - s) from it: 1 - s would cancel, and z u' is large
        r = 1 / (1 + e)
        s = tl.where(u >= 0, r, e * r)
        return z * s, s + 2 * z * (e * r * r) * slope


@triton.jit
def _other(up, HIDDEN_ACT: tl.constexpr):
    """What the activation is multiplied by, and its slope, at up, fp32."""
    if HIDDEN_ACT == "swiglu_oai":
        outside = tl.abs(up) > 7.0
        return 1 + tl.where(outside, tl.where(up > 0, 7.0, -7.0), up), tl.where(outside, 0.0, 1.0)
    else:
        return up, 1.0


@triton.jit
def _forward(
    GATE, UP, Y, width, gate_row, up_row, y_row, HIDDEN_ACT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    if gate_row is not None:
        row = tl.program_id(1).to(tl.int64)
        GATE, UP, Y = GATE + row * gate_row, UP + row * up_row, Y + row * y_row
    gate = tl.load(GATE + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(gate, HIDDEN_ACT)
    factor, _ = _other(up, HIDDEN_ACT)
    tl.store(Y + at, (value * factor).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    DY, GATE, UP, DGATE, DUP, Y, width, dy_row, gate_row, up_row, dgate_row, dup_row, y_row,
    HIDDEN_ACT: tl.constexpr, NEED_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    if dy_row is not None:
        row = tl.program_id(1).to(tl.int64)
        DY, GATE, UP = DY + row * dy_row, GATE + row * gate_row, UP + row * up_row
        DGATE, DUP, Y = DGATE + row * dgate_row, DUP + row * dup_row, Y + row * y_row
    dy = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate, HIDDEN_ACT)
    factor, inner = _other(up, HIDDEN_ACT)
    tl.store(DGATE + at, (dy * factor * slope).to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + at, (dy * value * inner).to(DUP.dtype.element_ty), mask=inside)
    if NEED_Y:
        tl.store(Y + at, (value * factor).to(Y.dtype.element_ty), mask=inside)


def _rows(*tensors: Tensor) -> tuple[int, int, list[int | None]]:
    """Return how many rows the tensors have, how long they are, and the stride of each one's rows.

    Contiguous tensors are one row, without strides. Others are [rows, width], with the values of a
    row in line.
    """
    first = tensors[0]
    for t in tensors:
        if not t.is_contiguous():
            return first.shape[0], first.shape[1], [t.stride(0) for t in tensors]
    return 1, first.numel(), [None] * len(tensors)


def forward(gate: Tensor, up: Tensor, y: Tensor, hidden_act: str) -> None:
    """Write a(gate) * up to y."""
    if gate.numel():
        rows, width, strides = _rows(gate, up, y)
        dispatch.launch(
            _forward,
            (-(-width // BLOCK), rows),
            gate,
            up,
            y,
            width,
            *strides,
            hidden_act,
            BLOCK,
            num_warps=THREADS // dispatch.lanes(),
        )


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, y: Tensor | None,
    hidden_act: str,
) -> None:  # fmt: skip
    """Write dgate, dup and, unless it is None, y. They may lie over the first three."""
    if gate.numel():
        tensors = dy, gate, up, dgate, dup, dy if y is None else y
        rows, width, strides = _rows(*tensors)
        dispatch.launch(
            _backward, (-(-width // BLOCK), rows), *tensors, width, *strides, hidden_act,
            y is not None, BLOCK,
            num_warps=THREADS // dispatch.lanes(),
        )  # fmt: skip


@triton.jit
def _tile(X, LOW, WIDE, m, n, rows, width, x_row, low_row, wide_low, wide_n, R, RANK: tl.constexpr):
    """X + LOW WIDE at rows m and columns n, fp32; LOW may be None. WIDE is [R, width]."""
    inside = (m < rows)[:, None] & (n < width)[None, :]
    x = tl.load(X + m[:, None] * x_row + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if LOW is not None:
        k = tl.arange(0, RANK)
        source = LOW + m[:, None] * low_row + k[None, :]
        low = tl.load(source, mask=(m < rows)[:, None] & (k < R)[None, :], other=0.0)
        source = WIDE + k[:, None] * wide_low + n[None, :].to(tl.int64) * wide_n
        wide = tl.load(source, mask=(k < R)[:, None] & (n < width)[None, :], other=0.0)
        x += tl.dot(low, wide, input_precision="ieee")
    return x


@triton.jit
def _added_forward(
    GATE, UP, Y, LOW0, LOW1, WIDE0, WIDE1, rows, width, gate_row, up_row, y_row, low0_row, low1_row,
    R0, R1, HIDDEN_ACT: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    gate = _tile(GATE, LOW0, WIDE0, m, n, rows, width, gate_row, low0_row, 1, R0, R0, RANK)
    up = _tile(UP, LOW1, WIDE1, m, n, rows, width, up_row, low1_row, 1, R1, R1, RANK)
    value, _ = _activate(gate, HIDDEN_ACT)
    factor, _ = _other(up, HIDDEN_ACT)
    inside = (m < rows)[:, None] & (n < width)[None, :]
    at = m[:, None] * y_row + n[None, :]
    tl.store(Y + at, (value * factor).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _added_backward(
    DY, GATE, UP, DGATE, DUP, LOW, LOW0, LOW1, WIDE, WIDE0, WIDE1, rows, width, dy_row, gate_row,
    up_row, dgate_row, dup_row, low_row, low0_row, low1_row, R, R0, R1, HIDDEN_ACT: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Y goes over DY, whose wide matrix is row-major; those of gate and up are column-major."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dy = _tile(DY, LOW, WIDE, m, n, rows, width, dy_row, low_row, width, 1, R, RANK)
    gate = _tile(GATE, LOW0, WIDE0, m, n, rows, width, gate_row, low0_row, 1, R0, R0, RANK)
    up = _tile(UP, LOW1, WIDE1, m, n, rows, width, up_row, low1_row, 1, R1, R1, RANK)
    value, slope = _activate(gate, HIDDEN_ACT)
    factor, inner = _other(up, HIDDEN_ACT)
    inside = (m < rows)[:, None] & (n < width)[None, :]
    at = DGATE + m[:, None] * dgate_row + n[None, :]
    tl.store(at, (dy * factor * slope).to(DGATE.dtype.element_ty), mask=inside)
    at = DUP + m[:, None] * dup_row + n[None, :]
    tl.store(at, (dy * value * inner).to(DUP.dtype.element_ty), mask=inside)
    at = DY + m[:, None] * dy_row + n[None, :]
    tl.store(at, (value * factor).to(DY.dtype.element_ty), mask=inside)


@functools.cache
def padded_rank(*ranks: int) -> int:
    """Return the depth of the tiles' products for updates of these ranks: a power of two."""
    return max(16, 1 << (max(ranks) - 1).bit_length())


def added_forward(
    gate: Tensor, up: Tensor, y: Tensor, hidden_act: str, of_gate: Update, of_up: Update
) -> None:
    """Write a(gate) * up to y [M, I], for gate and up without their updates."""
    M, width = gate.shape
    if M and width:
        R0, R1 = of_gate.low.shape[1], of_up.low.shape[1]
        dispatch.launch(
            _added_forward, (-(-width // TILE_COLUMNS), -(-M // TILE_ROWS)), gate, up, y,
            of_gate.low, of_up.low, of_gate.matrix, of_up.matrix, M, width, gate.stride(0),
            up.stride(0), y.stride(0), of_gate.low.stride(0), of_up.low.stride(0), R0, R1,
            hidden_act, padded_rank(R0, R1), TILE_ROWS, TILE_COLUMNS,
            num_warps=TILE_THREADS // dispatch.lanes(),
        )  # fmt: skip


def added_backward(
    dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, hidden_act: str,
    updates: Updates,
) -> None:  # fmt: skip
    """Write dgate, dup, and y over dy, for dy, gate and up without their updates, where not None.

    dgate and dup may lie over gate and up.
    """
    M, width = gate.shape
    if M and width:
        pairs = [update or (None, None) for update in updates]
        strides = [0 if low is None else low.stride(0) for low, _ in pairs]
        ranks = [0 if low is None else low.shape[1] for low, _ in pairs]
        (low, A), (low0, B0), (low1, B1) = pairs
        dispatch.launch(
            _added_backward, (-(-width // TILE_COLUMNS), -(-M // TILE_ROWS)), dy, gate, up, dgate,
            dup, low, low0, low1, A, B0, B1, M, width, dy.stride(0), gate.stride(0), up.stride(0),
            dgate.stride(0), dup.stride(0), *strides, *ranks, hidden_act, padded_rank(*ranks),
            TILE_ROWS, TILE_COLUMNS, num_warps=TILE_THREADS // dispatch.lanes(),
        )  # fmt: skip
