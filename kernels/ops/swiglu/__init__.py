"""The gated activations of the MLP (arXiv:2002.05202), elementwise: y = a(gate) up.

silu                a(z) = z sigmoid(z)                                   SwiGLU
gelu                a(z) = z Phi(z), Phi the normal distribution          GeGLU
gelu_pytorch_tanh   the same with Phi(z) ~ (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2

    d gate = dy up a'(gate)          d up = dy a(gate)

The names are those of `hidden_act` in a checkpoint's config.
"""

from types import ModuleType

import torch
from torch import Tensor

from ... import dispatch
from . import cpu, reference

ACTIVATIONS = tuple(cpu.ACTIVATIONS)
APPROXIMATIONS = {"tanh": "gelu_pytorch_tanh", "none": "gelu"}


def gated(gate: Tensor, up: Tensor, hidden_act: str) -> Tensor:
    """a(gate) * up, elementwise, for two tensors of one shape and dtype.

    Raises ValueError for another `hidden_act` than the three above.
    """
    if hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {hidden_act!r}: choose one of {', '.join(ACTIVATIONS)}")
    backend = _backend(gate, up)
    if backend is reference:
        return reference.gated(gate, up, hidden_act)
    with dispatch.on_device(gate):
        return GatedActivation.apply(gate, up, hidden_act, backend)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, for two tensors of one shape and dtype."""
    return gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up, elementwise; approximate: "tanh", or "none" for the exact form by erf.

    Raises ValueError for another `approximate`.
    """
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate is {approximate!r}: choose tanh or none")
    return gated(gate, up, APPROXIMATIONS[approximate])


def gated_backward_(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    hidden_act: str,
    into: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Backward in place, for a caller to whom the tensors belong: y is written over its gradient
    `grad`, d gate over gate and d up over up, or `into` two others. All contiguous, of one shape
    and dtype.
    """
    dgate, dup = into or (gate, up)
    backend = _backend(gate, up) if grad.dtype == gate.dtype else reference
    if backend is reference:
        return reference.gated_backward_(grad, gate, up, dgate, dup, hidden_act)
    with dispatch.on_device(gate):
        backend.backward(grad, gate, up, dgate, dup, grad, hidden_act)


class GatedActivation(torch.autograd.Function):
    """gate, up [...] -> [...]"""

    @staticmethod
    def forward(ctx, gate, up, hidden_act, backend):
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        backend.forward(gate, up, y, hidden_act)
        ctx.save_for_backward(gate, up)
        ctx.hidden_act, ctx.backend = hidden_act, backend
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        ctx.backend.backward(grad.contiguous(), gate, up, dgate, dup, None, ctx.hidden_act)
        return dgate, dup, None, None


def _backend(gate: Tensor, up: Tensor) -> ModuleType:
    if gate.dtype not in dispatch.FLOATS or (gate.dtype, gate.shape) != (up.dtype, up.shape):
        return reference
    picked = dispatch.pick(gate.device, "cpu", "triton")
    if picked == "triton":
        from . import triton

        return triton
    return cpu if picked == "cpu" and cpu.fits(gate) else reference
