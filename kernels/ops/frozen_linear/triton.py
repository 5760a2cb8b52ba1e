"""Products of a few rows with an NF4 weight on a GPU, straight from its 4 bits.

With few rows M a product takes as long as reading the weight does. These kernels read it packed,
0.52 bytes a value. To dequantize it first is to read that, to write 2 bytes and to read them again.

    vector     y = x W^T, one row of x at a time. A program sums a row of W in pieces of PIECE
               values; weights, products and sums are fp32.
    forward    y = x W^T by tl.dot: 16 rows of x and more, a tile of W's rows, a block of its
               columns at a time, so that every row of the tile has one scale.
    backward   dx = dy W by tl.dot: a tile of W's columns, all of its rows.

The tiles hold the weight's values rounded to x's dtype, as `dequantize_nf4` rounds them: the result
is that of dequantizing first, up to the order of an fp32 sum. Where the tiles are too few to fill a
GPU, the sum is cut into SPLIT parts that torch adds up: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from ..nf4 import NF4Tensor
from ..nf4.triton import packed_arguments, packed_options, scales_of, values_of

PIECE, VECTOR_WARPS = 1024, 2  # columns of W at a time, and threads, of a program of `vector`
TILE = 64  # rows of W in forward; in backward columns, if a block has as many
PROGRAMS = 256  # to fill a GPU with
FUSED = {"enable_fp_fusion": True}  # a product and a sum round once: nothing is held to their bits


@triton.jit
def _vector(
    CODES, SCALES, NESTED, OFFSET, MAP, PAIRS, X, BIAS, Y, N, K,
    largest: tl.constexpr, DOUBLE: tl.constexpr, PTX: tl.constexpr,
    HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    n, m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offset = tl.load(OFFSET)
    block = tl.arange(0, BLOCKS)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    column = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    row = n * (K // 2)
    total = tl.zeros((BLOCKS, 2 * HALF), tl.float32)
    for start in tl.range(0, K // 2, BLOCKS * HALF, loop_unroll_factor=4):
        packed = tl.load(CODES + row + start + byte, mask=start + byte < K // 2)
        of_block = start + block * HALF < K // 2
        which = (row + start) // HALF + block
        scale = scales_of(SCALES, NESTED, offset, MAP, which, of_block, largest, DOUBLE)
        w = values_of(packed, scale, PAIRS, PTX, tl.float32)
        at = 2 * start + column
        x = tl.load(X + m * K + at, mask=at < K, other=0.0).to(tl.float32)
        total += x * w
    y = tl.sum(total)
    if BIAS is not None:
        y += tl.load(BIAS + n).to(tl.float32)
    tl.store(Y + m * N + n, y.to(Y.dtype.element_ty))


@triton.jit
def _tile(
    CODES, SCALES, NESTED, offset, MAP, PAIRS, n, N, byte, K,
    largest: tl.constexpr, DOUBLE: tl.constexpr, PTX: tl.constexpr, HALF: tl.constexpr,
    COLUMNS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """W[n, 2 byte : 2 byte + COLUMNS] for rows n, within one block of columns; zeros from N on."""
    row = n.to(tl.int64) * (K // 2) + byte
    inside = n < N
    codes = CODES + row[:, None] + tl.arange(0, COLUMNS // 2)[None, :]
    packed = tl.load(codes, mask=inside[:, None], other=0)
    scale = scales_of(SCALES, NESTED, offset, MAP, row // HALF, inside, largest, DOUBLE)
    return values_of(packed, tl.where(inside, scale, 0.0), PAIRS, PTX, dtype)


@triton.jit
def _forward(
    CODES, SCALES, NESTED, OFFSET, MAP, PAIRS, X, BIAS, Y, M, N, K, steps, last,
    largest: tl.constexpr, DOUBLE: tl.constexpr, PTX: tl.constexpr,
    HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part, m = tl.program_id(1), tl.program_id(2) * BM + tl.arange(0, BM)
    column = tl.arange(0, BK)
    offset = tl.load(OFFSET)
    dtype: tl.constexpr = X.dtype.element_ty
    y = tl.zeros((BM, BN), tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, last)):
        k = step * BK
        at = m[:, None].to(tl.int64) * K + (k + column)[None, :]
        x = tl.load(X + at, mask=(m < M)[:, None], other=0.0)
        w = _tile(
            CODES, SCALES, NESTED, offset, MAP, PAIRS, n, N, k // 2, K,
            largest, DOUBLE, PTX, HALF, BK, dtype,
        )  # fmt: skip
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
    if BIAS is not None:
        bias = tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)
        y += tl.where(part == 0, bias, 0.0)[None, :]
    at = (part.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _backward(
    CODES, SCALES, NESTED, OFFSET, MAP, PAIRS, DY, BIAS, DX, M, N, K, steps, last,
    largest: tl.constexpr, DOUBLE: tl.constexpr, PTX: tl.constexpr,
    HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BK
    part, m = tl.program_id(1), tl.program_id(2) * BM + tl.arange(0, BM)
    offset = tl.load(OFFSET)
    dtype: tl.constexpr = DY.dtype.element_ty
    dx = tl.zeros((BM, BK), tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, last)):
        n = step * BN + tl.arange(0, BN)
        at = m[:, None].to(tl.int64) * N + n[None, :]
        dy = tl.load(DY + at, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        w = _tile(
            CODES, SCALES, NESTED, offset, MAP, PAIRS, n, N, k // 2, K,
            largest, DOUBLE, PTX, HALF, BK, dtype,
        )  # fmt: skip
        dx = tl.dot(dy, w, dx, input_precision="ieee")
    at = (part.to(tl.int64) * M + m)[:, None] * K + (k + tl.arange(0, BK))[None, :]
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=(m < M)[:, None])


def vector(x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """Return x [M, K] W^T + bias, row by row: [M, N]. K must be a multiple of the block."""
    (M, K), (N, _) = x.shape, q.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel():
        blocks = max(1, min(PIECE, 1 << (K - 1).bit_length()) // q.block_size)
        dispatch.launch(
            _vector, (N, M), *packed_arguments(q), x.contiguous(), bias, y, N, K,
            HALF=q.block_size // 2, BLOCKS=blocks, num_warps=VECTOR_WARPS,
            **(packed_options(q) | FUSED),
        )  # fmt: skip
    return y


def forward(x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """Return x [M, K] W^T + bias: [M, N]. K must be a multiple of the block."""
    N, K = q.shape
    return _product(_forward, x, q, bias, N, -(-N // TILE), K, min(q.block_size, 128))


def backward(grad: Tensor, q: NF4Tensor) -> Tensor:
    """Return grad [M, N] W: [M, K]. K must be a multiple of the block."""
    N, K = q.shape
    return _product(_backward, grad, q, None, K, K // min(q.block_size, 128), N, TILE)


def _product(
    kernel: triton.JITFunction, x: Tensor, q: NF4Tensor, bias: Tensor | None, width: int,
    tiles: int, depth: int, step: int,
) -> Tensor:  # fmt: skip
    """Multiply x [M, depth]: [M, width].

    `tiles` cover the width, and `step` of the depth are summed at once.
    """
    M = len(x)
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    rows, last = -(-M // block_m), -(-depth // step)
    split = max(1, min(-(-PROGRAMS // (tiles * rows)), last // 8))
    shape, dtype = ((M, width), x.dtype) if split == 1 else ((split, M, width), torch.float32)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    if y.numel():
        dispatch.launch(
            kernel, (tiles, split, rows), *packed_arguments(q), x.contiguous(), bias, y, M,
            *q.shape, -(-last // split), last, HALF=q.block_size // 2, BM=block_m, BN=TILE,
            BK=min(q.block_size, 128), num_warps=4, **packed_options(q),
        )  # fmt: skip
    return y if split == 1 else y.sum(0).to(x.dtype)
