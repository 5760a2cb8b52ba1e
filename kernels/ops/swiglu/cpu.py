"""Calls of the C++ kernels in cpu.cpp: fp32 and bf16, in host memory."""

import ctypes

from torch import Tensor

from ...dispatch import CPU_DTYPES, INT64, POINTER, address, run
from .activation import Activation


class Forward(ctypes.Structure):
    """`Forward` of cpu.cpp: the arguments of `gated`."""

    _fields_ = (
        *((name, POINTER) for name in ("gate", "up", "y")),
        *((name, INT64) for name in ("n", "activation")),
    )


class Backward(ctypes.Structure):
    """`Backward` of cpu.cpp: the arguments of `gated_backward`."""

    _fields_ = (
        *((name, POINTER) for name in ("dy", "gate", "up", "dgate", "dup", "y")),
        *((name, INT64) for name in ("n", "activation")),
    )


def fits(x: Tensor) -> bool:
    """Return whether the kernels take tensors like x."""
    return x.dtype in CPU_DTYPES


def forward(gate: Tensor, up: Tensor, y: Tensor, hidden_act: str) -> None:
    """Write a(gate) * up to y."""
    pointers = [address(t) for t in (gate, up, y)]
    run("gated", gate.dtype, Forward(*pointers, gate.numel(), Activation[hidden_act]))


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, y: Tensor | None,
    hidden_act: str,
) -> None:  # fmt: skip
    """Write dgate, dup and, unless it is None, y. They may lie over the first three."""
    pointers = [address(t) for t in (dy, gate, up, dgate, dup, y)]
    arguments = Backward(*pointers, gate.numel(), Activation[hidden_act])
    run("gated_backward", gate.dtype, arguments)
