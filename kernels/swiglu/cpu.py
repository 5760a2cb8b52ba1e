"""The kernels of cpu.cpp: fp32 and bf16, in host memory."""

import ctypes

import torch
from torch import Tensor

from ..dispatch import CPU_DTYPES, INT64, POINTER, address, run

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}  # -> their numbers in cpu.cpp


class Forward(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *((name, POINTER) for name in ("gate", "up", "y")),
        *((name, INT64) for name in ("n", "activation")),
    )


class Backward(ctypes.Structure):
    """cpu.cpp's."""

    _fields_ = (
        *((name, POINTER) for name in ("dy", "gate", "up", "dgate", "dup", "y")),
        *((name, INT64) for name in ("n", "activation")),
    )


def fits(x: Tensor) -> bool:
    """Whether the kernels take it."""
    return x.dtype in CPU_DTYPES


def _backward(dy, gate, up, dgate, dup, y, hidden_act: str) -> None:
    pointers = [address(t) for t in (dy, gate, up, dgate, dup, y)]
    arguments = Backward(*pointers, gate.numel(), ACTIVATIONS[hidden_act])
    run("gated_backward", gate.dtype, arguments)


class GatedActivation(torch.autograd.Function):
    """gate, up [...] -> [...]"""

    @staticmethod
    def forward(ctx, gate, up, hidden_act):
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        pointers = [address(t) for t in (gate, up, y)]
        run("gated", gate.dtype, Forward(*pointers, gate.numel(), ACTIVATIONS[hidden_act]))
        ctx.save_for_backward(gate, up)
        ctx.hidden_act = hidden_act
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _backward(grad.contiguous(), gate, up, dgate, dup, None, ctx.hidden_act)
        return dgate, dup, None


def gated(gate: Tensor, up: Tensor, hidden_act: str) -> Tensor:
    return GatedActivation.apply(gate, up, hidden_act)


def gated_backward_(grad: Tensor, gate: Tensor, up: Tensor, hidden_act: str) -> None:
    _backward(grad, gate, up, gate, up, grad, hidden_act)
