"""The gated activations of the MLP (arXiv:2002.05202), elementwise: y = a(gate) b(up).

    silu                a(z) = z sigmoid(z)                                   SwiGLU
    gelu                a(z) = z Phi(z), Phi the normal distribution          GeGLU
    gelu_pytorch_tanh   gelu with Phi(z) ~ (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2
    swiglu_oai          a(z) = c sigmoid(1.702 c), c = min(z, 7)              gpt-oss

b(u) = u, but for the last, whose b(u) = 1 + max(-7, min(u, 7)). The name is llama.cpp's; the files
of gpt-oss say "silu".

    d gate = dy b(up) a'(gate)       d up = dy a(gate) b'(up)

Low-rank updates may still be to be added to dy, gate and up (`updates.py`).

The names are those of `hidden_act` in a model's config.json; `activation.py` has the list of them.
"""

from types import ModuleType

import torch
from torch import Tensor

from ... import dispatch
from ...autograd import once_differentiable
from . import cpu, reference
from .activation import Activation, check_activation
from .updates import Update, Updates


def gated(gate: Tensor, up: Tensor, hidden_act: str) -> Tensor:
    """Compute a(gate) * b(up), elementwise (arXiv:2002.05202).

    Differentiable in both tensors; it keeps them for backward.

    Args:
        gate: [...], any floating-point dtype; kernels run for fp32, bf16 and fp16.
        up: the shape and dtype of `gate`.
        hidden_act: the activation a: "silu", "gelu_pytorch_tanh", "gelu" or "swiglu_oai"; for the
            last b(up) is 1 + up within -7 and 7, else it is up.

    Returns:
        a(gate) * b(up), in the shape and dtype of `gate`.

    Raises:
        ValueError: `hidden_act` is another name.
    """
    check_activation(hidden_act)
    if dispatch.traces():
        return dispatch.traced().gated(gate, up, hidden_act)
    backend = _backend(gate, up)
    if backend is reference:
        return reference.gated(gate, up, hidden_act)
    if not torch.is_grad_enabled():
        return _forward(gate.contiguous(), up.contiguous(), hidden_act, backend)
    return GatedActivation.apply(gate, up, hidden_act, backend)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up, elementwise (arXiv:2002.05202).

    Args:
        gate: [...], any floating-point dtype.
        up: the shape and dtype of `gate`.

    Returns:
        silu(gate) * up, in the shape and dtype of `gate`.
    """
    return gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """Compute gelu(gate) * up, elementwise (arXiv:2002.05202).

    Args:
        gate: [...], any floating-point dtype.
        up: the shape and dtype of `gate`.
        approximate: "tanh", or "none" for the exact form by erf.

    Returns:
        gelu(gate) * up, in the shape and dtype of `gate`.

    Raises:
        ValueError: `approximate` is another word.
    """
    for form in (Activation.gelu_pytorch_tanh, Activation.gelu):
        if form.approximate == approximate:
            return gated(gate, up, form.name)
    raise ValueError(f"approximate is {approximate!r}: choose tanh or none")


def gated_backward_(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    hidden_act: str,
    into: tuple[Tensor, Tensor] | None = None,
    updates: Updates | None = None,
) -> None:
    """Run the backward pass of `gated` in place, for a caller to whom the tensors belong.

    All tensors are of one shape and dtype, and contiguous. Where Triton runs, they may be matrices
    whose rows lie apart, and updates may still be to be added to them (`adds_updates`).

    Args:
        grad: dy [...]; y = a(gate) * up is written over it.
        gate: [...]; d gate is written over it, unless `into` is given.
        up: [...]; d up is written over it, unless `into` is given.
        hidden_act: the activation a, as in `gated`.
        into: the two tensors that d gate and d up are written to instead.
        updates: what is still to be added to dy, gate and up; None for nothing.
    """
    dgate, dup = into or (gate, up)
    if updates is not None:
        from . import triton

        return triton.added_backward(grad, gate, up, dgate, dup, hidden_act, updates)
    backend = _backend(gate, up) if grad.dtype == gate.dtype else reference
    if backend is reference:
        return reference.gated_backward_(grad, gate, up, dgate, dup, hidden_act)
    backend.backward(grad, gate, up, dgate, dup, grad, hidden_act)


def gated_beside(
    gate: Tensor,
    up: Tensor,
    hidden_act: str,
    room: int,
    updates: tuple[Update, Update] | None = None,
) -> Tensor:
    """Return a(gate) * up for matrices whose rows may lie apart, where Triton runs.

    Each row of the result has `room` values of memory beside it. `updates` are still to be added
    to gate and up. It is not differentiable.
    """
    from . import triton

    rows, width = gate.shape
    y = gate.new_empty(rows, width + room)[:, :width]
    if updates is None:
        triton.forward(gate, up, y, hidden_act)
    else:
        triton.added_forward(gate, up, y, hidden_act, *updates)
    return y


class GatedActivation(torch.autograd.Function):
    """Map gate and up [...] to y [...] by the kernels of a backend."""

    @staticmethod
    def forward(ctx, gate, up, hidden_act, backend):
        gate, up = gate.contiguous(), up.contiguous()
        y = _forward(gate, up, hidden_act, backend)
        ctx.save_for_backward(gate, up)
        ctx.hidden_act, ctx.backend = hidden_act, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        ctx.backend.backward(grad.contiguous(), gate, up, dgate, dup, None, ctx.hidden_act)
        return dgate, dup, None, None


def _forward(gate: Tensor, up: Tensor, hidden_act: str, backend: ModuleType) -> Tensor:
    y = torch.empty_like(gate)
    backend.forward(gate, up, y, hidden_act)
    return y


def _backend(gate: Tensor, up: Tensor) -> ModuleType:
    same = (gate.dtype, gate.shape) == (up.dtype, up.shape)
    cpu_takes, triton_takes = cpu.fits(gate), gate.dtype in dispatch.FLOATS
    return dispatch.backend(
        __package__, gate.device, cpu=same and cpu_takes, triton=same and triton_takes
    )
