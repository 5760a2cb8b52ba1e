"""The gated activations in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import Activation


def gated(gate: Tensor, up: Tensor, hidden_act: str) -> Tensor:
    """Return a(gate) * up."""
    return activate(gate, hidden_act) * up


def gated_backward_(
    grad: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, hidden_act: str
) -> None:
    """Write d gate to dgate, d up to dup, and y over its gradient `grad`."""
    act = activate(gate, hidden_act)
    through = grad * up
    if Activation[hidden_act] is Activation.silu:
        slope = torch.ops.aten.silu_backward(through, gate)
    else:
        approximate = Activation[hidden_act].approximate
        slope = torch.ops.aten.gelu_backward(through, gate, approximate=approximate)
    dgate.copy_(slope)
    torch.mul(act, up, out=through)
    torch.mul(grad, act, out=dup)
    grad.copy_(through)


def activate(x: Tensor, hidden_act: str) -> Tensor:
    """Return a(x)."""
    act = Activation[hidden_act]
    return F.silu(x) if act is Activation.silu else F.gelu(x, approximate=act.approximate)
