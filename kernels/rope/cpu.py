"""The kernels of cpu.cpp: fp32 and bf16, in host memory."""

import ctypes

import torch
from torch import Tensor

from ..dispatch import CPU_DTYPES, FLOAT, INT64, POINTER, run


class Heads(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *((name, POINTER) for name in ("input", "output")),
        *((name, INT64) for name in ("number", "in_batch", "in_token", "in_head")),
        *((name, INT64) for name in ("out_batch", "out_token", "out_head")),
    )


class Rotation(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *((name, Heads) for name in ("q", "k")),
        *((name, POINTER) for name in ("cos", "sin")),
        *((name, INT64) for name in ("B", "tokens", "table_batch", "half", "D")),
        ("sign", FLOAT),
    )


def fits(q: Tensor) -> bool:
    """Whether the kernels take it."""
    return q.dtype in CPU_DTYPES


def _heads(x: Tensor, out: Tensor) -> Heads:
    return Heads(x.data_ptr(), out.data_ptr(), x.shape[2], *x.stride()[:3], *out.stride()[:3])


def _rotate(
    pair: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, sign: float
) -> None:
    B, T, _, D = pair[0].shape
    half = cos.shape[-1]
    heads = [_heads(x, y) for x, y in zip(pair, out, strict=True)]
    sizes = B, T, 0 if cos.shape[0] == 1 else T * half, half, D
    run("rope", pair[0].dtype, Rotation(*heads, cos.data_ptr(), sin.data_ptr(), *sizes, sign))


def _rows_dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _new(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype) for x in tensors)


class Rotate(torch.autograd.Function):
    """q [B, T, Hq, D], k [B, T, Hk, D], cos and sin fp32 [B or 1, T, R/2] -> q, k turned"""

    @staticmethod
    def forward(ctx, q, k, cos, sin, inplace):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        if inplace:
            out = q.detach(), k.detach()
            _rotate((q, k), out, cos, sin, 1.0)
            torch.autograd.graph.increment_version((q, k))
            return out
        pair = _rows_dense(q, k)
        out = _new(*pair)
        _rotate(pair, out, cos, sin, 1.0)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        pair = _rows_dense(*grads)
        out = _new(*pair)
        _rotate(pair, out, *ctx.saved_tensors, -1.0)
        return *out, None, None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    return Rotate.apply(q, k, cos, sin, inplace)
