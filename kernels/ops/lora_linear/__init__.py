"""Linear layers with a low-rank update (LoRA, arXiv:2106.09685), differentiated by hand.

The maths
---------
With x [M, K], a frozen base weight W [N, K], bias b, A [r, K], B [N, r], and s = alpha / r:

    y  = x W^T + s (x A^T) B^T + b
    dx = dy W + s (dy B) A
    dA = s (dy B)^T x
    dB = s dy^T (x A^T)

Every product with A or B has a side of length r: no N x K update is ever formed, in either
direction. Layers that read one x (q, k and v; gate and up) stack their A: x is read once for
x [A_q; A_k; A_v]^T, and once for all of dA.

With dropout the update reads d(x), in which the share p is zero and the rest is divided by 1 - p.
dA and dB use d(x), and the part s (dy B) A of dx goes through the mask as well. Layers that share x
share the mask.

DoRA (arXiv:2402.09353) learns the length m of every row of the weight beside its direction:

    y  = g (x W^T + s (x A^T) B^T) + b         g = m / c,   c = ||W + s B A|| by rows
    c^2 = ||W||^2 + 2 s B . (W A^T) + s^2 B . (B (A A^T))          . and || by rows
    dm = (sum over rows of dy (y - b) / g) / c

where c is held constant in backward (section 4.3 of the paper). g scales dy, and the rest is as
above.

A whole gated MLP, y = down(a(gate(x)) up(x)), is one function of x: `lora_mlp`.

What is kept
------------
Backward gets x, the small matrices, x A^T (r values a token, on a CPU by rows and by columns), and
the seed of the masks. With `again` even x is not kept, but what x is a norm of, which the caller
keeps in any case (the decoder does so on a CPU). W is asked of the base when it is needed (a 4-bit
base dequantizes it again). The gate, up and hidden state of an MLP are computed again. For hidden
size H and intermediate size I that is 2 H bytes a token in bf16, for a third more products in the
MLP; autograd keeps 2 H + 8 I and more (x, gate, a(gate), up, y).

With `keep` gate and up are kept too, which saves a fifth of a step. The decoder asks for it where
there is memory. Under gradient checkpointing (`recomputed`) the second run of a block ends before
its MLP, which passes.py explains, and long rows go through the MLP in tiles.

How
---
Two classes compute the layers of one input: `reference.Group` by torch's products, with W dense
some rows at a time, and `cpu.Group` by sums of products straight from what is stored. On a GPU NF4
weights and updates of all its layers are one matrix, if x has room for low beside its rows
(`lora_room`, triton.py); there y of all layers lie in one memory. The base is
any callable with its `stored` weight and `bias`. What it returns is written to; the caller's
tensors are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ... import dispatch, pretend
from .. import swiglu
from . import reference
from .passes import Again, LoraLinears, LoraMLP, TiledMLPInput, TiledMLPOutput
from .spans import SpanWeights, by_itself, in_sums
from .tensors import Dropout, FrozenLinearMap, LoraTensors, Static


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """A base layer and its low-rank update (arXiv:2106.09685).

    Attributes:
        base: the frozen layer, base(x) = x W^T + bias, with its `stored` weight W [N, K].
        lora_A: A [r, K].
        lora_B: B [N, r].
        scaling: s, what B A is multiplied by.
        dropout: the share of x that the update does not read in this pass.
        magnitude: m [N], DoRA's length of every row of the weight (arXiv:2402.09353), or None.
        bias: [N], in place of the base's; None takes the base's.
        counter: int64 [] on the device, which the masks of dropout depend on too: a CUDA graph
            draws others when it has changed. None: on the generator alone.
    """

    base: FrozenLinearMap
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float = 0.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    counter: Tensor | None = None


LayerWeights = LoraWeights | SpanWeights
"""A base layer with the update of one adapter, or with those of several."""


def lora_linear(x: Tensor, layer: LoraWeights) -> Tensor:
    """Apply a linear layer with its low-rank update (arXiv:2106.09685).

    Differentiable in x, A, B, the bias and the magnitude. The weight of the base is frozen: it gets
    no gradient. The masks of dropout come from torch's global generator.

    Args:
        x: [..., K], any floating-point dtype.
        layer: the base and its update.

    Returns:
        base(x) + scaling (x A^T) B^T, [..., N] in x's dtype; with a magnitude DoRA's output.
    """
    return lora_qkv(x, [layer])[0]


@torch.no_grad()
def lora_row_norms(layer: LoraWeights) -> Tensor:
    """Compute the length of every row of W + s B A, DoRA's c (arXiv:2402.09353).

    It takes products of rank r; the sum itself is never formed.

    Args:
        layer: the base and its update.

    Returns:
        ||W + s B A|| of each row, [N] in fp32 or wider.
    """
    tensors = LoraTensors(layer.lora_A, layer.lora_B, None, None)
    dtype = layer.base.stored.dtype
    _, (pair,) = reference.cast_pairs([tensors], [layer.scaling], dtype)
    return reference.DenseLayer(layer.base, layer.scaling, tensors, pair).row_norms


def lora_room(x: Tensor, layers: Sequence[LayerWeights]) -> int:
    """Return how much room beside the rows of their input lets layers run as one product.

    Args:
        x: [..., K], what the input will be like: its dtype, device and number of rows count.
        layers: the bases and their updates, which read one input.

    Returns:
        The number of values of memory beside each row of the input, the sum of the ranks or a few
        more; 0 where the layers do not run so: elsewhere than on a GPU, for few rows, for other
        weights than NF4 or FP4, for an A or B of other strides or in fp64, with DoRA, with several
        adapters and under autocast.
    """
    if dispatch.traces() or not dispatch.triton_runs(x) or pretend.autocasts(x.device):
        return 0
    ranks, stored = 0, []
    for layer in layers:
        if type(layer) is SpanWeights:
            return 0
        A, B = layer.lora_A, layer.lora_B
        in_line = A.is_contiguous() and B.is_contiguous()  # else `cast` leaves them apart
        known = A.dtype in dispatch.FLOATS and B.dtype in dispatch.FLOATS
        if layer.magnitude is not None or not in_line or not known:
            return 0
        ranks += A.shape[0]
        stored += [layer.base.stored]
    triton, rows = reference.triton_kernels(), x.numel() // x.shape[-1]
    if not reference.FEW < rows <= triton.MOST_ROWS or not triton.joins(stored, ranks):
        return 0
    return -(-ranks // 16) * 16


def lora_qkv(
    x: Tensor, layers: Sequence[LayerWeights], *, again: Again = None, room: int = 0
) -> tuple[Tensor, ...]:
    """Apply several layers that read one x, such as q, k and v, each as `lora_linear` does.

    Args:
        x: [..., K], any floating-point dtype. The rows of adapters are those of x [M, K].
        layers: the bases and their updates, all of one dropout, and of one adapter or of several.
        again: (f, s) with x = f(s); s is kept for backward instead of x, which f makes again.
        room: what `lora_room` has returned, and x was made with; that memory is written to.

    Returns:
        The output of each layer, [..., N] in x's dtype. With room they lie in one memory.

    Raises:
        ValueError: the dropout of two layers differs.
    """
    flat = x.reshape(-1, x.shape[-1])
    if type(layers[0]) is SpanWeights:
        ys = _qkv_of_several(flat, _of_several(layers), again)
    elif dispatch.traces():
        return dispatch.traced().lora_qkv(x, layers)
    else:
        one = cast(Sequence[LoraWeights], layers)
        ys = LoraLinears.apply(flat, again, room, *_static(one), *tensors_of(one))
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def lora_mlp(
    x: Tensor,
    gate: LayerWeights,
    up: LayerWeights,
    down: LayerWeights,
    hidden_act: str,
    *,
    keep: bool = False,
    recomputed: bool = False,
    again: Again = None,
    room: int = 0,
) -> Tensor:
    """Apply a gated MLP, down(a(gate(x)) * up(x)), whose layers have low-rank updates.

    For backward it keeps x alone, and computes the rest again.

    Args:
        x: [..., K], any floating-point dtype.
        gate: the layer that a is taken of, [I, K].
        up: the layer that a is multiplied by, [I, K], of the dropout of `gate`.
        down: the layer of the product, [N, I].
        hidden_act: the activation a: "silu", "gelu_pytorch_tanh" or "gelu".
        keep: whether gate(x) and up(x) are kept for backward too.
        recomputed: whether this runs again right before backward, under gradient checkpointing.
            Then the second run ends here, nothing but x is kept whatever `keep` says, and more than
            TILE rows are computed in tiles. N = K. It makes no difference with several adapters.
        again: as in `lora_qkv`.
        room: as in `lora_qkv`, of gate and up.

    Returns:
        The output of `down`, [..., N] in x's dtype.

    Raises:
        ValueError: `hidden_act` is another name, or the dropout of gate and up differs.
    """
    swiglu.check_activation(hidden_act)
    layers = [gate, up, down]
    flat = x.reshape(-1, x.shape[-1])
    if type(gate) is SpanWeights:
        y = _mlp_of_several(flat, _of_several(layers), hidden_act, keep, again)
        return y.view(*x.shape[:-1], y.shape[1])
    if dispatch.traces():
        return dispatch.traced().lora_mlp(x, layers, hidden_act, keep)
    one = cast(Sequence[LoraWeights], layers)
    inner, outer = _static(one[:2]), _static(one[2:])
    rooms = (room, lora_room(x, [down])) if room else (0, 0)
    tensors = tensors_of(one)
    if recomputed:
        static = inner, outer
        flat = TiledMLPInput.apply(flat, hidden_act, again, rooms, static, *tensors)
        y = TiledMLPOutput.apply(flat, hidden_act, rooms, static, tensors)
    else:
        y = LoraMLP.apply(flat, hidden_act, keep, again, rooms, *inner, *outer, *tensors)
    return y.view(*x.shape[:-1], y.shape[1])


def _of_several(layers: Sequence[LayerWeights]) -> list[SpanWeights]:
    """Return the layers, which have the updates of several adapters; raise ValueError if not."""
    found = [layer for layer in layers if isinstance(layer, SpanWeights)]
    if len(found) < len(layers):
        raise ValueError("layers that share an input must all have one adapter, or all several")
    return found


def _qkv_of_several(x: Tensor, layers: list[SpanWeights], again: Again) -> Sequence[Tensor]:
    """Return what each layer makes of x [M, K], [M, N]."""
    static = [update for layer in layers for update in layer.static()]
    tensors = [t for layer in layers for t in layer.tensors()]
    if not in_sums(x, static, tensors):
        return [by_itself(x, each) for each in layers]
    return LoraLinears.apply(x, again, 0, static, Dropout(0.0, 0), *tensors)


def _mlp_of_several(
    x: Tensor, layers: list[SpanWeights], hidden_act: str, keep: bool, again: Again
) -> Tensor:
    """Return what gate, up and down make of x [M, K], [M, N]."""
    inner = [update for layer in layers[:2] for update in layer.static()]
    outer, tensors = layers[2].static(), [t for layer in layers for t in layer.tensors()]
    if not in_sums(x, [*inner, *outer], tensors):
        gate_x, up_x = (by_itself(x, each) for each in layers[:2])
        return by_itself(swiglu.gated(gate_x, up_x, hidden_act), layers[2])
    none = Dropout(0.0, 0)
    static = inner, none, outer, none
    return LoraMLP.apply(x, hidden_act, keep, again, (0, 0), *static, *tensors)


def shared_dropout(layers: Sequence[LoraWeights]) -> float:
    """Return the dropout of layers that share an input; raise ValueError if it is not one."""
    rate = layers[0].dropout
    for layer in layers:
        if layer.dropout != rate:
            raise ValueError("layers that share an input must have the same dropout")
    return rate


def _static(layers: Sequence[LoraWeights]) -> tuple[Static, Dropout]:
    """Return what autograd does not see of layers that share an input."""
    rate = shared_dropout(layers)
    # drawn from the generator in host memory: nothing waits for the device
    seed = int(torch.randint(2**62, (), device="cpu")) if rate else 0
    static = [(layer.base, layer.scaling, None) for layer in layers]
    return static, Dropout(rate, seed, layers[0].counter)


def tensors_of(layers: Sequence[LoraWeights]) -> list[Tensor | None]:
    """Return what autograd sees of the layers: TENSORS of each, side by side."""
    found: list[Tensor | None] = []
    for layer in layers:
        bias = layer.base.bias if layer.bias is None else layer.bias
        found += [layer.lora_A, layer.lora_B, bias, layer.magnitude]
    return found
