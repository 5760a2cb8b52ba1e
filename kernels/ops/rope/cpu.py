"""The kernels of cpu.cpp: fp32 and bf16, in host memory."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import CPU_DTYPES, FLOAT, INT64, POINTER, address, run
from ..rms_norm import scale_of

AXES = ("batch", "token", "head")


class Heads(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *((name, POINTER) for name in ("input", "x", "w", "output")),
        ("number", INT64),
        *((f"{of}_{axis}", INT64) for of in ("in", "x", "out") for axis in AXES),
    )


class Rotation(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *((name, Heads) for name in ("q", "k")),
        *((name, POINTER) for name in ("cos", "sin")),
        *((name, INT64) for name in ("B", "tokens", "table_batch", "half", "D", "llama")),
        *((name, FLOAT) for name in ("sign", "eps", "offset")),
    )


class Norms(NamedTuple):
    """Of q's and of k's heads."""

    weights: tuple[Tensor, Tensor]  # [D]
    eps: float
    offset: float
    casting_mode: str


def fits(q: Tensor) -> bool:
    """Whether the kernels take it."""
    return q.dtype in CPU_DTYPES


def _heads(x: Tensor, raw: Tensor | None, weight: Tensor | None, out: Tensor) -> Heads:
    pointers = [address(t) for t in (x, raw, weight, out)]
    of_raw = (0, 0, 0) if raw is None else raw.stride()[:3]
    return Heads(*pointers, x.shape[2], *x.stride()[:3], *of_raw, *out.stride()[:3])


def _rotate(
    pair: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, sign: float,
    norms: Norms | None = None, raw: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:  # fmt: skip
    """`raw`: q and k before the norm, for its backward."""
    B, T, _, D = pair[0].shape
    half = cos.shape[-1]
    weights = norms.weights if norms else (None, None)
    heads = [_heads(*of) for of in zip(pair, raw, weights, out, strict=True)]
    sizes = B, T, 0 if cos.shape[0] == 1 else T * half, half, D
    options = (sign, norms.eps, norms.offset) if norms else (sign, 0.0, 0.0)
    llama = norms is not None and norms.casting_mode == "llama"
    arguments = Rotation(*heads, cos.data_ptr(), sin.data_ptr(), *sizes, llama, *options)
    run("rope", pair[0].dtype, arguments)


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


class NormRotate(torch.autograd.Function):
    """The same, of normalized heads"""

    @staticmethod
    def forward(ctx, q, k, cos, sin, norms):
        cos, sin = cos.contiguous(), sin.contiguous()
        pair = _rows_dense(q, k)
        ctx.save_for_backward(*pair, cos, sin, *norms.weights)
        ctx.options = norms[1:]
        out = _new(*pair)
        _rotate(pair, out, cos, sin, 1.0, norms)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        q, k, cos, sin, *weights = ctx.saved_tensors
        pair = _rows_dense(*grads)
        out = _new(*pair)
        _rotate(pair, out, cos, sin, -1.0, Norms(tuple(weights), *ctx.options), (q, k))
        return *out, None, None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    return Rotate.apply(q, k, cos, sin, inplace)


def norm_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    offset: float, casting_mode: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    both = [scale_of(w.detach(), offset, casting_mode) for w in (q_weight, k_weight)]
    weights, (offset, _) = zip(*both, strict=True)
    return NormRotate.apply(q, k, cos, sin, Norms(weights, eps, offset, casting_mode))
