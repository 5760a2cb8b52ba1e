"""Dropout on a GPU: a program draws the words of a block and writes it, x times scale or 0."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from .reference import LANES

THREADS = 128


@triton.jit
def _part(X, Y, at, n, word, threshold, scale):
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    y = tl.where(word < threshold, x * scale, 0.0)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["seed"])  # every layer has one: they share a compiled kernel
def _dropout(
    X, Y, COUNTER, n, seed, threshold: tl.constexpr, scale: tl.constexpr, LANES: tl.constexpr
):
    block, lane = tl.program_id(0), tl.arange(0, LANES)
    counter = tl.load(COUNTER)
    call = (block.to(tl.int64) * LANES + lane).to(tl.uint32)
    nothing = call * 0
    low, high = counter.to(tl.uint32) + nothing, (counter >> 32).to(tl.uint32) + nothing
    w0, w1, w2, w3 = tl.philox(seed, call, nothing, low, high)
    at = block.to(tl.int64) * (4 * LANES) + lane
    _part(X, Y, at, n, w0, threshold, scale)
    _part(X, Y, at + LANES, n, w1, threshold, scale)
    _part(X, Y, at + 2 * LANES, n, w2, threshold, scale)
    _part(X, Y, at + 3 * LANES, n, w3, threshold, scale)


def dropout(x: Tensor, threshold: int, scale: float, seed: int, counter: Tensor) -> Tensor:
    """Return x, contiguous, times `scale` where its word is below the threshold, else 0."""
    y = torch.empty_like(x)
    if n := x.numel():
        dispatch.launch(
            _dropout, (-(-n // (4 * LANES)),), x, y, counter, n, seed, threshold, scale, LANES,
            num_warps=THREADS // dispatch.lanes(),
        )  # fmt: skip
    return y
