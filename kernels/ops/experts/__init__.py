"""The MLPs of a mixture of experts, all in the same few launches (arXiv:1701.06538, section 2).

The maths
---------
A router picks k of E experts for each of n tokens, and weighs them. Each expert is a gated MLP
whose three layers have their own frozen weights and low-rank updates (`lora_linear`):

    y_t = sum over its picks (e, w) of w down_e(a(gate_e(x_t)) * up_e(x_t))

With down(h) = W_down h + b, w goes into the hidden state and the bias,

    w down(h) = W_down (w h) + w b

and its gradient needs no output of `down`:

    dw = dh . h + dy . b        dh = dy W_down, and dh . h = dup . up, as h = a(gate) up

In gpt-oss h is not linear in up, so that h is made again. The rest is as in `lora_linear`, expert
by expert.

The layout
----------
The n k picks are sorted by expert:

    order   [n k]      the number of the pick in each row      token = order // k
    bounds  [E + 1]    where the rows of each expert begin     0 <= ... <= n k
    places  [n, k]     the row of each pick: the inverse of order

All three stay on the device. How many tokens an expert has, the host does not know: a launch has as
many programs as the worst case takes, and the shapes depend on n, k and E alone. So nothing waits,
and a step can be recorded and run again.

The weight of an expert stays in memory of its own. The kernels get a table of addresses, which is
made once for each layer.

The trade-off
-------------
An expert without tokens gets zero gradients, where autograd would give it none; and its packed
weight is made dense in vain. With fewer picks than experts that is most of the work, so a caller
does better to run the few experts one by one. With `reference` each runs by itself in any case.
"""

from torch import Tensor

from ... import dispatch
from .. import swiglu
from . import reference
from .layers import ExpertLayers, grouped, takes


def takes_experts(x: Tensor, *layers: ExpertLayers) -> bool:
    """Tell whether the kernels take these layers of all experts.

    They do on a GPU where Triton runs, of NVIDIA's from Ampere on, if what the experts store
    differs in values alone and can be read by addresses. Dense weights must have the dtype of x.
    They do not while something is traced.

    Args:
        x: [n, K], the tokens.
        layers: gate, up and down.

    Returns:
        True if `expert_mlp` computes all experts together.
    """
    if not dispatch.triton_runs(x) or dispatch.traces():
        return False
    # before Ampere nothing multiplies tiles of bf16, and the kernels would spill
    multiplies = dispatch.compiles_to() == "amdgcn" or dispatch.capability(x.device) >= (8, 0)
    return multiplies and all(takes(x, each) for each in layers)


def expert_mlp(
    x: Tensor,
    picked: Tensor,
    weights: Tensor,
    gate: ExpertLayers,
    up: ExpertLayers,
    down: ExpertLayers,
    hidden_act: str,
    *,
    keep: bool = False,
) -> Tensor:
    """Apply the gated MLPs of a mixture of experts to the tokens that they are picked for.

    Differentiable in x, the weights, and every A and B.

    Args:
        x: [n, K], fp32, bf16 or fp16 on a GPU, any floating-point dtype elsewhere.
        picked: the experts of each token, int64 [n, k].
        weights: what their outputs are multiplied by, [n, k], fp32.
        gate: the layers that the activation is taken of, [I, K] each.
        up: the layers that it is multiplied by, [I, K] each.
        down: the layers of the product, [N, I] each.
        hidden_act: the activation: "silu", "gelu_pytorch_tanh", "gelu" or "swiglu_oai".
        keep: whether the outputs of gate and up are kept for backward, which otherwise computes
            them again.

    Returns:
        The weighed sum of the experts' outputs, [n, N] in x's dtype.

    Raises:
        ValueError: `hidden_act` is another name.
    """
    swiglu.check_activation(hidden_act)
    layers = gate, up, down
    if not takes_experts(x, *layers):
        return reference.expert_mlp(x, picked, weights, *layers, hidden_act)
    from . import passes

    groups = grouped(picked, len(gate.stored))
    tensors = passes.tensors(layers)
    return passes.ExpertMLP.apply(x, weights, groups, layers, hidden_act, keep, *tensors)
