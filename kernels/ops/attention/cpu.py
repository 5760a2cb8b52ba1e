"""Calls of the C++ kernels in cpu.cpp, in host memory.

They take fp32 and bf16, and fp16 by way of fp32 copies. In bf16 sums are in fp32, and products too
unless the processor is faster with pairs of bf16 (`dispatch.multiplies_pairs`). q, k, v and the
gradient are read where they lie, whatever their strides, if the D values of a head are side by
side.
"""

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch, threads
from ...autograd import once_differentiable
from ...dispatch import CPU_DTYPES, FLOAT, INT64, POINTER, address, run
from .sinks import sinks_gradient, with_sinks


class HeadsView(ctypes.Structure):
    """`HeadsView` of cpu.cpp: a tensor [B, T or S, heads, D] with its strides."""

    _fields_ = (("data", POINTER), *((name, INT64) for name in ("batch", "token", "head")))


class Attention(ctypes.Structure):
    """`Attention` of cpu.cpp: the arguments of both directions."""

    _fields_ = (
        *((name, HeadsView) for name in ("q", "k", "v", "dy", "y", "dq", "dk", "dv")),
        *((name, POINTER) for name in ("lse", "dk_sums", "dv_sums", "mask")),
        *((name, POINTER) for name in ("blocks", "seen", "turns", "space")),
        *((name, INT64) for name in ("count", "mask_batch", "mask_token", "slots", "size")),
        *((name, INT64) for name in ("T", "S", "Hq", "Hk", "D", "tokens", "window", "pairs")),
        *((name, FLOAT) for name in ("scale", "softcap")),
    )


class AttentionOptions(NamedTuple):
    """The arguments that are not tensors."""

    scale: float
    softcap: float  # 0: none
    window: int  # positions that a query may look back, its own included
    lengths: tuple[int, ...]  # of the documents in a row of the batch


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> bool:
    """Return whether the kernels take the operands.

    A single token uses each key and value once: to lay them out for the kernels would cost more.
    """
    (B, T, Hq, D), (S, Hk) = q.shape, k.shape[1:3]
    same = q.dtype in dispatch.FLOATS and q.dtype == k.dtype == v.dtype
    if not same or k.shape != (B, S, Hk, D) or v.shape != k.shape or Hq % Hk or T == 1:
        return False
    if scale is not None and scale <= 0:
        return False
    if mask is None:
        return T == S
    shapes = (T, S), (1, 1, T, S), (B, 1, T, S)
    return mask.dtype == torch.bool and mask.shape in shapes


def view_of(x: Tensor | None) -> HeadsView:
    """Return where x [B, T, heads, D] lies; a null pointer for None."""
    return HeadsView() if x is None else HeadsView(address(x), *x.stride()[:3])


def dense_rows(x: Tensor) -> Tensor:
    """Return x with the values of its last dimension side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.lru_cache(maxsize=64)
def _sizes(isa: str, D: int, group: int) -> tuple[int, ...]:
    """Return the tokens of a block, the keys of a block, and the floats of a thread's space."""
    sizes = (INT64 * 3)()
    entry = dispatch.sizes_function("attention_sizes", INT64, INT64, POINTER)
    entry(D, group, ctypes.addressof(sizes))
    return tuple(sizes)


@functools.lru_cache(maxsize=16)  # all layers of a model, in both directions, ask for one
def _blocks(B: int, lengths: tuple[int, ...], tokens: int) -> Tensor:
    """Return `Block[]` of cpu.cpp for the documents in each row, the latest tokens first."""
    starts = list(itertools.accumulate(lengths, initial=0))[:-1]
    blocks = [
        (b * len(lengths) + i, b, start, length, number)
        for b in range(B)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
        for number in range(-(-length // tokens))
    ]
    blocks.sort(key=lambda block: -block[4])
    return torch.tensor(blocks, dtype=torch.int64, device="cpu")


def _launch(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
    *,
    dy: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    sums: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    (B, T, Hq, D), (S, Hk), on = q.shape, k.shape[1:3], q.device
    tokens, keys, size = _sizes(dispatch.isa(), D, Hq // Hk)
    blocks = _blocks(B, options.lengths, tokens)
    documents, slots = B * len(options.lengths), min(threads.count(), len(blocks) * Hk)
    space = torch.empty((slots, size), dtype=torch.float32, device=on)
    turns = None
    if dk is not None:
        turns = torch.zeros((documents, Hk, -(-S // keys)), dtype=torch.int32, device=on)
    seen, strides = None, (0, 0)
    if mask is not None:
        shape = documents, -(-T // tokens), -(-S // keys)
        seen = torch.empty(shape, dtype=torch.uint8, device=on)
        strides = 0 if mask.shape[0] == 1 else mask.stride(0), mask.stride(1)
    arguments = Attention(
        *(view_of(x) for x in (q, k, v, dy, y, dq, dk, dv)),
        *(address(x) for x in (lse, *sums, mask, blocks, seen, turns, space)),
        *(len(blocks), *strides, slots, size),
        *(T, S, Hq, Hk, D, tokens, options.window, dispatch.multiplies_pairs()),
        *(options.scale, options.softcap),
    )
    run(op, q.dtype, arguments)


class BlockwiseAttention(torch.autograd.Function):
    """Map q [B, T, Hq, D], k, v [B, S, Hk, D] and a mask [B or 1, T, S] to y [B, T, Hq, D].

    There may be sinks [Hq].
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, mask, options):
        q, k, v = (dense_rows(x) for x in (q, k, v))
        B, T, Hq, _ = q.shape
        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((B, Hq, T), dtype=torch.float32, device=q.device)
        _launch("attention", q, k, v, y, lse, mask, options)
        y, lse = with_sinks(y, lse, sinks)
        ctx.save_for_backward(q, k, v, sinks, y, lse, mask)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, sinks, y, lse, mask = ctx.saved_tensors
        B, S, Hk, D = k.shape
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        make = k.new_empty if mask is None else k.new_zeros  # whose keys may be seen by nobody
        dk, dv = make(k.shape), make(k.shape)
        wide = (B, S, Hk, -(-D // 16) * 16)  # whole vectors, to which the units add in fp32
        sums = [torch.empty(wide, dtype=torch.float32, device=q.device) for _ in range(2)]
        gradients = {"dy": dense_rows(dy), "dq": dq, "dk": dk, "dv": dv, "sums": tuple(sums)}
        _launch("attention_backward", q, k, v, y, lse, mask, ctx.options, **gradients)
        dsinks = sinks_gradient(dy, y, lse, sinks) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, dsinks, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    lengths: Sequence[int] | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend by the kernels, for operands that fit; a `window` needs a mask of None."""
    T, D = q.shape[1], q.shape[3]
    lengths = (T,) if lengths is None else tuple(lengths)
    options = AttentionOptions(
        scale or D**-0.5, softcap or 0.0, T if window is None else window, lengths
    )
    if mask is not None:
        mask = dense_rows(mask[None] if mask.dim() == 2 else mask[:, 0])
    dtype = q.dtype
    if dtype not in CPU_DTYPES:
        q, k, v = q.float(), k.float(), v.float()
    return BlockwiseAttention.apply(q, k, v, sinks, mask, options).to(dtype)
