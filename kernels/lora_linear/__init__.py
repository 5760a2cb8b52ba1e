"""Linear layers with a low-rank update (LoRA, arXiv:2106.09685), differentiated by hand.

The maths
---------
With x [M, K], a frozen base weight W [N, K], bias b, A [r, K], B [N, r], and s = alpha / r:

    y  = x W^T + s (x A^T) B^T + b
    dx = dy W + s (dy B) A
    dA = s (dy B)^T x
    dB = s dy^T (x A^T)

Every product with A or B has a side of length r: no N x K update is ever formed, in either
direction. Layers that read the same x (q, k and v; gate and up) stack their A: x is read once for
x [A_q; A_k; A_v]^T, and once for all of dA.

With dropout the update reads d(x), the share p of it zero and the rest over 1 - p: dA and dB use
d(x), and the part s (dy B) A of dx goes through the same mask. Layers that share x share the mask.

DoRA (arXiv:2402.09353) learns the length m of every row of the weight beside its direction:

    y  = g (x W^T + s (x A^T) B^T) + b         g = m / c,   c = ||W + s B A|| by rows
    c^2 = ||W||^2 + 2 s B . (W A^T) + s^2 B . (B (A A^T))          . and || by rows
    dm = (sum over rows of dy (y - b) / g) / c

with c held constant in backward (section 4.3 there). g scales dy, and the rest is as above.

A whole gated MLP, y = down(a(gate(x)) up(x)), is one function of x: `lora_mlp`.

What is kept
------------
x, the small matrices, and the seed of the masks. W is asked of the base when it is needed (a 4-bit
base dequantizes it again). x A^T, and the gate, up and hidden state of an MLP, are computed again:
for hidden size H and intermediate size I that is 2 H bytes a token in bf16 instead of the 2 H + 8 I
and more that autograd keeps (x, gate, a(gate), up, y), for a third more products in the MLP. With
`keep` gate and up are kept too. The decoder asks for it where products are dear, on a CPU (a fifth
of a step), and under gradient checkpointing: there a block is computed again right before its
backward, what it keeps lives for that block only, and gate and up would be computed three times.

The base is any callable with `panels(dtype)` and `bias`: the op need not know how the weight is
stored. What it returns is written to; none of the caller's tensors is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..frozen_linear import Panels
from ..swiglu import ACTIVATIONS
from . import reference


class Base(Protocol):
    """A frozen linear map: base(x) = x W^T + bias, in memory of its own, and its W."""

    def __call__(self, x: Tensor) -> Tensor: ...

    panels: Callable[[torch.dtype], Panels]  # -> W [N, K] dense in that dtype, some rows at a time
    bias: Tensor | None  # [N]


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """A base layer and its update: lora_A [r, K], lora_B [N, r], magnitude [N] for DoRA."""

    base: Base
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float = 0.0
    magnitude: Tensor | None = None


def lora_linear(x: Tensor, layer: LoraWeights) -> Tensor:
    """base(x) + scaling (x A^T) B^T for x [..., K]: [..., N] in x's dtype.

    Differentiable in x, A, B, the base's bias and the magnitude; the base's weight is frozen: a
    gradient for it is not computed. Masks of dropout come from torch's global generator.
    """
    return lora_qkv(x, [layer])[0]


def lora_qkv(x: Tensor, layers: Sequence[LoraWeights]) -> tuple[Tensor, ...]:
    """`lora_linear` of several layers that read the same x, such as q, k and v.

    Raises ValueError where their dropout differs.
    """
    flat = x.reshape(-1, x.shape[-1])
    ys = reference.LoraLinears.apply(flat, *_static(layers), *_tensors(layers))
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def lora_mlp(
    x: Tensor,
    gate: LoraWeights,
    up: LoraWeights,
    down: LoraWeights,
    hidden_act: str,
    *,
    keep: bool = False,
) -> Tensor:
    """down(a(gate(x)) * up(x)) for x [..., K]; hidden_act: "silu", "gelu_pytorch_tanh" or "gelu".

    Keeps x alone for backward, with `keep` also gate(x) and up(x). Raises ValueError for another
    activation, or where the dropout of gate and up differs.
    """
    if hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {hidden_act!r}: choose one of {', '.join(ACTIVATIONS)}")
    layers = [gate, up, down]
    inner, outer = _static(layers[:2]), _static(layers[2:])
    flat = x.reshape(-1, x.shape[-1])
    y = reference.LoraMLP.apply(flat, hidden_act, keep, *inner, *outer, *_tensors(layers))
    return y.view(*x.shape[:-1], y.shape[1])


def _static(layers: Sequence[LoraWeights]) -> tuple[list, reference.Dropout]:
    """What autograd does not see of layers that share an input."""
    if len({layer.dropout for layer in layers}) > 1:
        raise ValueError("layers that share an input must have the same dropout")
    rate = layers[0].dropout
    # drawn from the generator in host memory: nothing waits for the device
    seed = int(torch.randint(2**62, (), device="cpu")) if rate else 0
    return [(layer.base, layer.scaling) for layer in layers], reference.Dropout(rate, seed)


def _tensors(layers: Sequence[LoraWeights]) -> list[Tensor | None]:
    return [
        tensor
        for layer in layers
        for tensor in (layer.lora_A, layer.lora_B, layer.base.bias, layer.magnitude)
    ]
