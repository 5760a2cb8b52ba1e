"""The MLPs of experts in plain torch, one expert after the other."""

import torch.nn.functional as F
from torch import Tensor

from ..frozen_linear.dense import dequantize
from ..swiglu import reference as swiglu
from .layers import ExpertLayers


def linear(x: Tensor, layers: ExpertLayers, expert: int) -> Tensor:
    """Return y [m, N] of one expert's layer for x [m, K]."""
    stored = layers.stored[expert]
    W = stored if isinstance(stored, Tensor) else dequantize(stored, x.dtype)
    bias = layers.bias[expert].to(x.dtype) if layers.bias else None
    y = F.linear(x, W.to(x.dtype), bias)
    if layers.lora_A:
        A, B = layers.lora_A[expert].to(x.dtype), layers.lora_B[expert].to(x.dtype)
        y = y + layers.scaling * F.linear(F.linear(x, A), B)
    return y


def expert_mlp(
    x: Tensor, picked: Tensor, weights: Tensor, gate: ExpertLayers, up: ExpertLayers,
    down: ExpertLayers, hidden_act: str,
) -> Tensor:  # fmt: skip
    """Return the sum of the picked experts' outputs, weighed: [n, N]."""
    y = x.new_zeros(len(x), down.stored[0].shape[0])
    for expert in range(len(gate.stored)):
        token, pick = (picked == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        rows = x[token]
        hidden = swiglu.gated(linear(rows, gate, expert), linear(rows, up, expert), hidden_act)
        found = linear(hidden, down, expert) * weights[token, pick, None]
        y = y.index_add(0, token, found.to(x.dtype))
    return y
