"""SwiGLU and GeGLU on a GPU: flat, 1024 values a program, fp32 inside.

With a = act(gate), and a' its slope,

    y = a up          d gate = dy up a'          d up = dy a

    silu:  a = z s(z)                 a' = s(z) (1 + z (1 - s(z)))           s the sigmoid
    gelu:  a = z P(z)                 a' = P(z) + z p(z)                     P and p of the normal
    tanh:  a = z s                    a' = s + 2 z s (1 - s) u'              s = s(2 u(z))

where the last is z (1 + tanh u) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3). Backward keeps gate
and up only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4


@triton.jit
def _activate(z, KIND: tl.constexpr):
    """The activation and its slope at z, fp32."""
    if KIND == "silu":
        s = tl.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    elif KIND == "none":
        half = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return z * half, half + z * density
    else:
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * z * z)
        e = tl.exp(-2 * tl.abs(u))  # s and s (1 - s) from it: 1 - s would cancel, and z u' is large
        r = 1 / (1 + e)
        s = tl.where(u >= 0, r, e * r)
        return z * s, s + 2 * z * (e * r * r) * slope


@triton.jit
def _forward(GATE, UP, Y, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    gate = tl.load(GATE + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(gate, KIND)
    tl.store(Y + at, (value * up).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(DY, GATE, UP, DGATE, DUP, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    dy = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate, KIND)
    tl.store(DGATE + at, (dy * up * slope).to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + at, (dy * value).to(DUP.dtype.element_ty), mask=inside)


class GatedActivation(torch.autograd.Function):
    """gate, up [...] -> [...]; kind: "silu", "tanh" or "none" """

    @staticmethod
    def forward(ctx, gate, up, kind):
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        if n := gate.numel():
            _forward[(triton.cdiv(n, BLOCK),)](gate, up, y, n, kind, BLOCK, num_warps=WARPS)
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        if n := gate.numel():
            grid = (triton.cdiv(n, BLOCK),)
            _backward[grid](grad, gate, up, dgate, dup, n, ctx.kind, BLOCK, num_warps=WARPS)
        return dgate, dup, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return GatedActivation.apply(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    return GatedActivation.apply(gate, up, approximate)
