"""The kernels of cpu.cpp: fp32 and bf16, in host memory."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch

POINTER, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # -> the end of a function's name


class View(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (("data", POINTER), *((name, INT64) for name in ("batch", "token", "head")))


class Attention(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *((name, View) for name in ("q", "k", "v", "dy", "y", "dq")),
        *((name, POINTER) for name in ("lse", "dk", "dv", "mask")),
        *((name, POINTER) for name in ("blocks", "seen", "turns", "space")),
        *((name, INT64) for name in ("count", "mask_batch", "mask_token", "slots", "size")),
        *((name, INT64) for name in ("T", "S", "Hq", "Hk", "D", "tokens", "window")),
        *((name, FLOAT) for name in ("scale", "softcap")),
    )


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernels take them. A single token is one product with each key and value: packing
    those would cost more.
    """
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype or q.shape[1] == 1:
        return False
    if mask is None:
        return q.shape[1] == k.shape[1]
    return mask.dtype == torch.bool and (mask.dim() == 2 or mask.shape[1] == 1)


def _view(x: Tensor | None) -> View:
    return View() if x is None else View(x.data_ptr(), *x.stride()[:3])


def _dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _blocks(B: int, T: int, lengths: Sequence[int] | None, tokens: int) -> tuple[Tensor, int]:
    """int64 [blocks, 5], those of the latest tokens first, and the number of documents."""
    if lengths is None:
        documents = [(b, b, 0, T) for b in range(B)]
    else:
        ends = torch.tensor(lengths).cumsum(0).tolist()
        documents = [(i, 0, end - n, n) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))]
    blocks = [(*document, i) for document in documents for i in range(-(-document[3] // tokens))]
    blocks.sort(key=lambda block: -block[4])
    return torch.tensor(blocks, dtype=torch.int64), len(documents)


def _run(op: str, q, k, v, dy, y, dq, lse, dk, dv, mask, options) -> None:
    scale, softcap, window, lengths = options
    (B, T, Hq, D), (S, Hk) = q.shape, k.shape[1:3]
    sizes = (INT64 * 3)()
    dispatch.function("attention_sizes", INT64, INT64, POINTER)(D, Hq // Hk, ctypes.addressof(sizes))
    tokens, keys, size = sizes
    blocks, documents = _blocks(B, T, lengths, tokens)
    slots = min(torch.get_num_threads(), len(blocks) * Hk)
    space = torch.empty(slots, size, dtype=torch.float32)
    turns = torch.zeros(documents, Hk, -(-S // keys), dtype=torch.int32)
    seen, strides = None, (0, 0)
    if mask is not None:
        seen = torch.empty(documents, -(-T // tokens), -(-S // keys), dtype=torch.uint8)
        strides = 0 if mask.shape[0] == 1 else mask.stride(0), mask.stride(1)
    pointers = [None if x is None else x.data_ptr() for x in (lse, dk, dv, mask)]
    arguments = Attention(
        *(_view(x) for x in (q, k, v, dy, y, dq)),
        *pointers,
        *(None if x is None else x.data_ptr() for x in (blocks, seen, turns, space)),
        *(len(blocks), *strides, slots, size),
        *(T, S, Hq, Hk, D, tokens, S if window is None else window),
        *(D**-0.5 if scale is None else scale, softcap or 0.0),
    )
    dispatch.function(f"{op}_{DTYPES[q.dtype]}", POINTER)(ctypes.addressof(arguments))


class CausalAttention(torch.autograd.Function):
    """q [B, T, Hq, D], k and v [B, S, Hk, D], mask [B or 1, T, S] -> [B, T, Hq, D]"""

    @staticmethod
    def forward(ctx, q, k, v, mask, *options):
        q, k, v = _dense_rows(q, k, v)
        y = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        _run("attention", q, k, v, None, y, None, lse, None, None, mask, options)
        ctx.save_for_backward(q, k, v, y, lse, mask)
        ctx.options = options
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, y, lse, mask = ctx.saved_tensors
        (grad,) = _dense_rows(grad)
        dq = torch.empty(q.shape, dtype=q.dtype)
        B, S, Hk, D = k.shape
        dk, dv = (torch.zeros(B, S, Hk, -(-D // 16) * 16, dtype=torch.float32) for _ in range(2))
        _run("attention_backward", q, k, v, grad, y, dq, lse, dk, dv, mask, ctx.options)
        return dq, *(x[..., :D].to(k.dtype) for x in (dk, dv)), *[None] * 5


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    lengths: Sequence[int] | None,
) -> Tensor:
    if mask is not None:
        mask = mask[None] if mask.dim() == 2 else mask[:, 0]
        (mask,) = _dense_rows(mask)
    return CausalAttention.apply(q, k, v, mask, scale, softcap, window, lengths)
