"""The kernels of cpu.cpp: fp32 and bf16, in host memory."""

import ctypes

from torch import Tensor

from ...dispatch import CPU_DTYPES, INT64, POINTER, address, run

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


def forward(gate: Tensor, up: Tensor, y: Tensor, hidden_act: str) -> None:
    pointers = [address(t) for t in (gate, up, y)]
    run("gated", gate.dtype, Forward(*pointers, gate.numel(), ACTIVATIONS[hidden_act]))


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, y: Tensor | None,
    hidden_act: str,
) -> None:  # fmt: skip
    """The last three are written, and may lie over the first three."""
    pointers = [address(t) for t in (dy, gate, up, dgate, dup, y)]
    arguments = Backward(*pointers, gate.numel(), ACTIVATIONS[hidden_act])
    run("gated_backward", gate.dtype, arguments)
