"""float8 on a GPU: the roundings by Triton, bit for bit the reference, and torch's product.

Rows: a program rounds one row of up to three matrices that lie side by side. It reads them twice,
for the largest magnitude and for the values; the second time they come out of a cache. Weights:
level * (scale / w) is rounded once, from fp32. For the transpose a program takes a tile of ROWS
rows and one block of columns, and stores it by columns.

PTX's conversion to e4m3 saturates (cvt.rn.satfinite), and keeps NaN.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from ..nf4 import NF4Tensor
from ..nf4 import triton as nf4
from ..nf4.triton import packed_arguments, packed_options, scales_of, values_of
from .reference import E4M3, FLOOR, LARGEST

BLOCK, THREADS = 4096, 256  # values of a row at a time
ROWS, COLUMNS, TILE_THREADS = 128, 64, 128  # of a tile of W
EXACT = {"enable_fp_fusion": False}


@triton.jit
def _largest(X, S, n, BLOCK: tl.constexpr):
    """The largest magnitude of n values, times S."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    found = tl.max(largest)
    if S is not None:
        found = found * tl.load(S)
    return found


@triton.jit
def _round(X, S, Y, n, over, BLOCK: tl.constexpr):
    """Y = e4m3(X S over), n values."""
    if S is not None:
        over = tl.load(S) * over
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(Y + at, (x * over).to(Y.dtype.element_ty), mask=at < n)


@triton.jit
def _scaled_rows(
    X0, X1, X2, S0, S1, S2, Y, SCALE, stride0, stride1, stride2, n0, n1, n2,
    floor: tl.constexpr, top: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = _largest(X0 + row * stride0, S0, n0, BLOCK)
    if PARTS > 1:
        largest = tl.maximum(largest, _largest(X1 + row * stride1, S1, n1, BLOCK))
    if PARTS > 2:
        largest = tl.maximum(largest, _largest(X2 + row * stride2, S2, n2, BLOCK))
    largest = tl.maximum(largest, floor)
    tl.store(SCALE + row, tl.div_rn(largest, top))
    over = tl.div_rn(top, largest)
    Y += row * (n0 + n1 + n2)
    _round(X0 + row * stride0, S0, Y, n0, over, BLOCK)
    if PARTS > 1:
        _round(X1 + row * stride1, S1, Y + n0, n1, over, BLOCK)
    if PARTS > 2:
        _round(X2 + row * stride2, S2, Y + n0 + n1, n2, over, BLOCK)


@triton.jit
def _weight_columns(
    CODES, SCALES, NESTED, OFFSET, MAP, PAIRS, OVER, Y, N, K, stride,
    largest: tl.constexpr, DOUBLE: tl.constexpr, PTX: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Y [K, N], whose rows lie `stride` apart."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    inside = n < N
    byte = n.to(tl.int64) * (K // 2) + first // 2
    codes = CODES + byte[:, None] + tl.arange(0, COLUMNS // 2)[None, :]
    packed = tl.load(codes, mask=inside[:, None], other=0)
    block = byte // HALF
    scale = scales_of(SCALES, NESTED, tl.load(OFFSET), MAP, block, inside, largest, DOUBLE)
    values = values_of(packed, scale * tl.load(OVER), PAIRS, PTX, Y.dtype.element_ty)
    at = (first + tl.arange(0, COLUMNS)).to(tl.int64)[:, None] * stride + n[None, :]
    tl.store(Y + at, tl.trans(values), mask=inside[None, :])


def scaled_rows(parts: Sequence[Tensor], scales: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Launch the kernel for matrices whose rows may lie apart; see reference.scaled_rows."""
    M, widths = len(parts[0]), [part.shape[1] for part in parts]
    y = torch.empty((M, sum(widths)), dtype=E4M3, device=parts[0].device)
    scale = torch.empty((M, 1), dtype=torch.float32, device=parts[0].device)
    block = min(BLOCK, 1 << (max(widths) - 1).bit_length())
    filling = 3 - len(parts)
    if M:
        dispatch.launch(
            _scaled_rows, (M,), *parts, *[parts[0]] * filling, *scales, *[None] * filling, y, scale,
            *(part.stride(0) for part in parts), *[0] * filling, *widths, *[0] * filling,
            FLOOR, LARGEST, len(parts), block,
            num_warps=max(1, min(THREADS, block // 16) // dispatch.lanes()), **EXACT,
        )  # fmt: skip
    return y, scale


def weight_rows(q: NF4Tensor, over: Tensor) -> Tensor:
    """Launch the kernel of NF4 with scales times `over`; see reference.weight_rows."""
    return nf4.dequantize(q, E4M3, over)


def weight_columns(q: NF4Tensor, over: Tensor, out: Tensor) -> None:
    """Launch the kernel for q [N, K] with whole blocks in each row; see reference."""
    N, K = q.shape
    columns = min(COLUMNS, q.block_size)
    if N and K:
        dispatch.launch(
            _weight_columns, (-(-N // ROWS), K // columns), *packed_arguments(q), over, out, N, K,
            out.stride(0), HALF=q.block_size // 2, ROWS=ROWS, COLUMNS=columns,
            num_warps=TILE_THREADS // dispatch.lanes(), **packed_options(q),
        )  # fmt: skip


def product(
    x: tuple[Tensor, Tensor], w: Tensor, scales: Tensor, fast: bool, out: Tensor | None
) -> Tensor:
    """Return x [M, K] w^T for e4m3 w [N, K] with `scales` fp32 [1, N], in bf16 [M, N].

    `fast` sums keep fewer bits of fp32 on the way, on an H100 some 14.
    """
    values, scale = x
    options = {"scale_a": scale, "scale_b": scales, "use_fast_accum": fast}
    if out is None:
        return torch._scaled_mm(values, w.t(), out_dtype=torch.bfloat16, **options)
    torch._scaled_mm(values, w.t(), out_dtype=torch.bfloat16, **options, out=out)
    return out
