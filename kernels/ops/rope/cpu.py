"""Calls of the C++ kernel in cpu.cpp: fp32 and bf16, in host memory."""

import ctypes

from torch import Tensor

from ...dispatch import CPU_DTYPES, FLOAT, INT64, POINTER, address, run
from ..rms_norm import scale_of
from .norms import HeadNorms

AXES = ("batch", "token", "head")


class Heads(ctypes.Structure):
    """`Heads` of cpu.cpp: q or k with its strides, and what becomes of it."""

    _fields_ = (
        *((name, POINTER) for name in ("input", "x", "w", "output")),
        ("number", INT64),
        *((f"{of}_{axis}", INT64) for of in ("in", "x", "out") for axis in AXES),
    )


class Rotation(ctypes.Structure):
    """`Rotation` of cpu.cpp: the arguments of `rope`."""

    _fields_ = (
        *((name, Heads) for name in ("q", "k")),
        *((name, POINTER) for name in ("cos", "sin")),
        *((name, INT64) for name in ("B", "tokens", "table_batch", "half", "D", "llama")),
        *((name, FLOAT) for name in ("sign", "eps", "offset")),
    )


def fits(q: Tensor) -> bool:
    """Return whether the kernel takes tensors like q."""
    return q.dtype in CPU_DTYPES


def head_norms(
    q_weight: Tensor, k_weight: Tensor, eps: float, offset: float, casting_mode: str
) -> HeadNorms:
    """Return the norms as the kernel takes them: for "llama" the offset is in the weights."""
    q_weight, _ = scale_of(q_weight.detach(), offset, casting_mode)
    k_weight, offset = scale_of(k_weight.detach(), offset, casting_mode)
    return HeadNorms((q_weight, k_weight), eps, offset, casting_mode)


def _heads(x: Tensor, raw: Tensor | None, weight: Tensor | None, out: Tensor) -> Heads:
    pointers = [address(t) for t in (x, raw, weight, out)]
    of_raw = (0, 0, 0) if raw is None else raw.stride()[:3]
    return Heads(*pointers, x.shape[2], *x.stride()[:3], *of_raw, *out.stride()[:3])


def rotate(
    pair: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, *,
    back: bool, norms: HeadNorms | None = None,
    raw: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:  # fmt: skip
    """Write q and k of `pair`, turned, to `out`, which may be the pair itself.

    norms: normalize the heads first. back: turn the other way, and undo the norm as backward does,
    for which `raw` is q and k before the norm.
    """
    B, T, _, D = pair[0].shape
    half = cos.shape[-1]
    weights = norms.weights if norms else (None, None)
    heads = [_heads(*of) for of in zip(pair, raw, weights, out, strict=True)]
    sizes = B, T, 0 if cos.shape[0] == 1 else T * half, half, D
    sign = -1.0 if back else 1.0
    options = (sign, norms.eps, norms.offset) if norms else (sign, 0.0, 0.0)
    llama = norms is not None and norms.casting_mode == "llama"
    arguments = Rotation(*heads, address(cos), address(sin), *sizes, llama, *options)
    run("rope", pair[0].dtype, arguments)
