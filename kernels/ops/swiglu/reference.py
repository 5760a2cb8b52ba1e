"""The gated activations in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import Activation

_ALPHA, _LIMIT = 1.702, 7.0  # of swiglu_oai, in every published model


def gated(gate: Tensor, up: Tensor, hidden_act: str) -> Tensor:
    """Return a(gate) * b(up)."""
    return activate(gate, hidden_act) * other(up, hidden_act)


def gated_backward_(
    grad: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, hidden_act: str
) -> None:
    """Write d gate to dgate, d up to dup, and y over its gradient `grad`."""
    act, factor, kind = activate(gate, hidden_act), other(up, hidden_act), Activation[hidden_act]
    through, up_slope = grad * factor, act
    if kind is Activation.silu:
        slope = torch.ops.aten.silu_backward(through, gate)
    elif kind is Activation.swiglu_oai:
        scaled = gate.clamp(max=_LIMIT) * _ALPHA
        slope = torch.ops.aten.silu_backward(through, scaled) * (gate <= _LIMIT)
        up_slope = act * (up.abs() <= _LIMIT)
    else:
        slope = torch.ops.aten.gelu_backward(through, gate, approximate=kind.approximate)
    dgate.copy_(slope)
    torch.mul(act, factor, out=through)
    torch.mul(grad, up_slope, out=dup)
    grad.copy_(through)


def activate(x: Tensor, hidden_act: str) -> Tensor:
    """Return a(x)."""
    act = Activation[hidden_act]
    if act is Activation.swiglu_oai:
        clamped = x.clamp(max=_LIMIT)
        return clamped * torch.sigmoid(clamped * _ALPHA)
    return F.silu(x) if act is Activation.silu else F.gelu(x, approximate=act.approximate)


def other(up: Tensor, hidden_act: str) -> Tensor:
    """Return b(up), what a(gate) is multiplied by."""
    if Activation[hidden_act] is Activation.swiglu_oai:
        return up.clamp(-_LIMIT, _LIMIT) + 1
    return up
