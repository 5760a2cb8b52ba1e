"""Causal attention in 16 bits by torch's FlashAttention 2 on a GPU, with the same bits every time.

    forward    y and lse_i = ln sum_j e^s_ij        backward    dq, dk and dv from these

Which kernels `scaled_dot_product_attention` takes is torch's choice, and cuDNN's backward, its
first one on sm_90, adds dq up by atomics in whatever order programs come
(https://github.com/pytorch/pytorch/pull/182551; cuDNN has another algorithm, which torch does not
ask for). FlashAttention has a backward in a fixed order. It takes memory for dq once per split of
the keys, and is asked for by a setting of the process, which is read when backward is launched.

So both halves are called by name here, and the setting holds for that one call. A thread that
launches products by cuBLAS in the same microseconds would see it; torch has no narrower one.
Forward is the same with and without gradients, so that no loss depends on who asks for it.

Long rows take less time in triton.py. On an H200, with 32 heads of 128 and 8 of keys, forward and
backward reach these TFLOP/s (docs/dev/LOG.md, 2026-11-29, "the step on an H200"):

    tokens                2,048       4,096       8,192       16,384
    FlashAttention 2      208, 134    276, 164    322, 180    335, 189
    Triton                232, 69     371, 200    430, 255    454, 297

Both together take 2 / forward + 5 / backward. Along ln tokens the logarithm of their ratio is drawn
as a line from 2,048 to 4,096, which passes 1 at LONG. What was not measured, other heads and other
GPUs, stays with FlashAttention 2. The choice asks for shapes and the GPU alone, so that a row that
is computed again gets the same bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ... import dispatch, pretend

WIDEST = 256  # head that FlashAttention 2 takes
LONG, LONG_HEAD, LONG_ON = 3366, 128, (9, 0)  # tokens, from which on triton.py is faster; see above


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether q [B, T, Hq, D], k and v [B, S, Hk, D], without a mask, are to go here."""
    if pretend.kind_of(q.device) == "cpu" or not dispatch.triton_runs(q) or not q.numel():
        return False
    same = q.dtype == k.dtype == v.dtype != torch.float32 and k.shape == v.shape
    square = q.shape[:2] == k.shape[:2] and q.shape[2] % k.shape[2] == 0
    if not same or not square or q.shape[3] % 8 or not q.shape[3] == k.shape[3] <= WIDEST:
        return False
    if dispatch.compiles_to() == "amdgcn":
        return True
    capability = dispatch.capability(q.device)
    ours = capability == LONG_ON and q.shape[3] == LONG_HEAD and q.shape[1] >= LONG
    return capability >= (8, 0) and not ours


@contextmanager
def deterministic() -> Iterator[None]:
    """Ask torch's kernels for the same bits every time while the block runs.

    `use_deterministic_algorithms` would set torch's compiler too, which takes a second to import.
    Memory that is not written yet stays so: to fill it would be a pass over each gradient.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warns)
        torch._C._set_deterministic_fill_uninitialized_memory(fills)


class FlashAttention(torch.autograd.Function):
    """Map q [B, Hq, T, D], k and v [B, Hk, T, D] to y [B, Hq, T, D], causally."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        y, lse, *bounds, seed, offset, _ = flash(q, k, v, 0.0, True, False, scale=scale)
        ctx.bounds, ctx.scale = bounds, scale  # of rows of unequal lengths: there are none
        ctx.save_for_backward(q, k, v, y, lse, seed, offset)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, y, lse, *random = ctx.saved_tensors
        back = torch.ops.aten._scaled_dot_product_flash_attention_backward
        given = grad, q, k, v, y, lse, *ctx.bounds
        with deterministic():
            found = back(*given, 0.0, True, *random, scale=ctx.scale)
        return *found, None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attend causally with q [B, T, Hq, D] to k and v [B, T, Hk, D]: [B, T, Hq, D]."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return FlashAttention.apply(*heads, scale).transpose(1, 2)
