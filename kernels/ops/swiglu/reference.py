"""The gated activations in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

APPROXIMATE = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}  # torch's names of the two


def gated(gate: Tensor, up: Tensor, hidden_act: str) -> Tensor:
    return _activation(gate, hidden_act) * up


def gated_backward_(
    grad: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, hidden_act: str
) -> None:
    act = _activation(gate, hidden_act)
    through = grad * up
    if hidden_act == "silu":
        slope = torch.ops.aten.silu_backward(through, gate)
    else:
        approximate = APPROXIMATE[hidden_act]
        slope = torch.ops.aten.gelu_backward(through, gate, approximate=approximate)
    dgate.copy_(slope)
    torch.mul(act, up, out=through)
    torch.mul(grad, act, out=dup)
    grad.copy_(through)


def _activation(gate: Tensor, hidden_act: str) -> Tensor:
    if hidden_act == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate=APPROXIMATE[hidden_act])
