"""The operators of linear layers with low-rank updates.

    tensors    A, B, and the bias and magnitude that there are, of all layers side by side
    names      which of the four a layer has: "A B bias"
    weights    the parts of the stored weights, side by side, and `forms` with the rest (packed.py)
    rates      the dropout of each input, and a tensor of `seeds` for each that is not 0

The backward is the op's own, which needs x and the small tensors; x A^T, which the op keeps, is
computed again. `lora_mlp` returns gate and up too, if they are kept, as one tensor.

A seed is a tensor because a number would be the same in every run of a graph. Where the op keeps
what x is a norm of, in the place of x, x is kept: a compiler decides by itself what it computes
again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import lora_linear as op
from ..ops.lora_linear import passes
from ..ops.lora_linear.reference import stacked
from ..ops.lora_linear.tensors import Dropout, Static
from .library import Kept, apart, define, gradient, like
from .packed import Frozen, parts, whole_of_each

NAMES = "A", "B", "bias", "magnitude"  # in the order of LoraTensors
LAYERS = (
    "Tensor[] tensors, Tensor[] weights, Tensor[] seeds, str[] names, str[] forms, "
    "float[] scalings, float[] rates"
)


class Layers(NamedTuple):
    """The arguments LAYERS of an operator."""

    tensors: list[Tensor]
    weights: list[Tensor]
    seeds: list[Tensor]
    names: list[str]
    forms: list[str]
    scalings: list[float]
    rates: list[float]

    def every(self) -> list[Tensor | None]:
        """Return the four tensors of each layer, None where it has none."""
        left = iter(self.tensors)
        there = [layer.split() for layer in self.names]
        return [next(left) if name in layer else None for layer in there for name in NAMES]

    def static(self) -> Static:
        """Return the base and the scaling of each layer."""
        stored, biases = whole_of_each(self.weights, self.forms), self.every()[2::4]
        bases = [Frozen(w, bias) for w, bias in zip(stored, biases, strict=True)]
        return [(base, s, None) for base, s in zip(bases, self.scalings, strict=True)]

    def dropouts(self) -> list[Dropout]:
        """Return the masks of each input."""
        left = iter(self.seeds)
        return [Dropout(rate, int(next(left)) if rate else 0) for rate in self.rates]

    def rows(self) -> list[int]:
        """Return the number of outputs of each layer."""
        return [B.shape[0] for B in self.every()[1::4] if B is not None]

    def needs(self, needed: Sequence[bool]) -> list[bool]:
        """Return which of `every` need a gradient, where `needed` says it of `tensors`."""
        left = iter(needed)
        return [t is not None and next(left) for t in self.every()]


def _taken(given: Sequence[Tensor | None], need: Sequence[bool]) -> list[Tensor]:
    return [t for t, needed in zip(given, need, strict=True) if needed and t is not None]


# ---- layers that read one x ----


def _layers(x: Tensor, *given: Any) -> list[Tensor]:
    layers = Layers(*given)
    (drop,) = layers.dropouts()
    return apart(
        passes.LoraLinears.forward(Kept(), x, None, 0, layers.static(), drop, *layers.every())
    )


def _layers_backward(grads: list[Tensor], need: list[bool], x: Tensor, *given: Any) -> list[Tensor]:
    layers, needs = Layers(*given), [need[0], *Layers(*given).needs(need[1:])]
    (drop,) = layers.dropouts()
    ctx = Kept(make=None, groups=None, static=layers.static(), drop=drop)
    ctx.saved_tensors = x, *layers.every()
    ctx.needs_input_grad = needs[0], *(False,) * 4, *needs[1:]
    dx, *others = passes.LoraLinears.backward(ctx, *grads)
    return apart(_taken([dx, *others[4:]], needs))


define(
    "lora_qkv",
    f"(Tensor x, {LAYERS}) -> Tensor[]",
    _layers,
    lambda x, *given: [x.new_empty(x.shape[0], n) for n in Layers(*given).rows()],
)
define(
    "lora_qkv_backward",
    f"(Tensor[] grads, bool[] need, Tensor x, {LAYERS}) -> Tensor[]",
    _layers_backward,
    lambda grads, need, x, tensors, *rest: like(_taken([x, *tensors], need)),
)


# ---- the MLP ----


def _mlp(x: Tensor, hidden_act: str, keep: bool, *given: Any) -> list[Tensor]:
    layers, ctx = Layers(*given), Kept()
    static, (inner, outer) = layers.static(), layers.dropouts()
    groups = static[:2], inner, static[2:], outer
    y = passes.LoraMLP.forward(ctx, x, hidden_act, keep, None, (0, 0), *groups, *layers.every())
    if not keep:
        return apart([y])
    _, gate, up, *_ = ctx.saved_tensors
    pair = stacked([gate, up])
    return apart([y, torch.stack([gate, up]) if pair is None else pair])


def _fake_mlp(x: Tensor, hidden_act: str, keep: bool, *given: Any) -> list[Tensor]:
    layers = Layers(*given)
    inner, _, outer = layers.rows()
    y = x.new_empty(x.shape[0], outer)
    if not keep:
        return [y]
    static, none = layers.static(), Dropout(0.0, 0)
    first, _ = passes.mlp_groups(x, ((static[:2], none), (static[2:], none)), layers.every())
    return [y, x.new_empty(2, x.shape[0], inner, dtype=first.dtype)]


def _mlp_backward(
    grad: Tensor, need: list[bool], pair: Tensor | None, x: Tensor, hidden_act: str, *given: Any
) -> list[Tensor]:
    layers, needs = Layers(*given), [need[0], *Layers(*given).needs(need[1:])]
    static, (inner, outer) = layers.static(), layers.dropouts()
    ctx = Kept(make=None, groups=None, hidden_act=hidden_act, rooms=(0, 0))
    ctx.static = (static[:2], inner), (static[2:], outer)
    kept = (None, None) if pair is None else pair.unbind()
    ctx.saved_tensors = x, *kept, *layers.every()
    ctx.needs_input_grad = needs[0], *(False,) * 8, *needs[1:]
    dx, *others = passes.LoraMLP.backward(ctx, grad)
    return apart(_taken([dx, *others[8:]], needs))


define("lora_mlp", f"(Tensor x, str hidden_act, bool keep, {LAYERS}) -> Tensor[]", _mlp, _fake_mlp)
define(
    "lora_mlp_backward",
    f"(Tensor grad, bool[] need, Tensor? pair, Tensor x, str hidden_act, {LAYERS}) -> Tensor[]",
    _mlp_backward,
    lambda grad, need, pair, x, act, tensors, *rest: like(_taken([x, *tensors], need)),
)


# ---- gradients ----


def _keep(ctx: Any, x: Tensor, given: Sequence[Any], pair: Sequence[Tensor]) -> None:
    layers = Layers(*given)
    ctx.sizes = [len(pair), 1, len(layers.tensors), len(layers.weights), len(layers.seeds)]
    ctx.strings = layers[3:]
    ctx.save_for_backward(*pair, x, *layers.tensors, *layers.weights, *layers.seeds)


def _kept(ctx: Any) -> tuple[Tensor | None, Tensor, Layers]:
    """Return gate and up, if they are kept, x, and the layers."""
    found, lists = list(ctx.saved_tensors), []
    for size in ctx.sizes:
        lists.append(found[:size])
        found = found[size:]
    pair, (x,), *others = lists
    return pair[0] if pair else None, x, Layers(*others, *ctx.strings)


def _given_back(ctx: Any, need: list[bool], found: Sequence[Tensor]) -> tuple:
    """Return a gradient or None for x and for each argument of LAYERS."""
    left = iter(found)
    dx, *others = [next(left) if needed else None for needed in need]
    *_, weights, seeds = ctx.sizes
    return dx, others, [None] * weights, [None] * seeds, None, None, None, None


def _keep_layers(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    _keep(ctx, inputs[0], inputs[1:], [])


def _backward_of_layers(ctx: Any, grads: list[Tensor]) -> tuple:
    of_x, of_tensors, *_ = ctx.needs_input_grad
    need, (_, x, layers) = [of_x, *of_tensors], _kept(ctx)
    found = torch.ops.lorakit.lora_qkv_backward(list(grads), need, x, *layers)
    return _given_back(ctx, need, found)


def _keep_mlp(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, ctx.hidden_act, _, *given = inputs
    _keep(ctx, x, given, output[1:])


def _backward_of_mlp(ctx: Any, grads: list[Tensor]) -> tuple:
    of_x, _, _, of_tensors, *_ = ctx.needs_input_grad
    need, (pair, x, layers) = [of_x, *of_tensors], _kept(ctx)
    found = torch.ops.lorakit.lora_mlp_backward(grads[0], need, pair, x, ctx.hidden_act, *layers)
    dx, *others = _given_back(ctx, need, found)
    return dx, None, None, *others


gradient("lora_qkv", _keep_layers, _backward_of_layers)
gradient("lora_mlp", _keep_mlp, _backward_of_mlp)


# ---- what the public functions call ----


def _arguments(layers: Sequence[Any], rates: list[float]) -> Layers:
    """Return `LoraWeights` as the operators take them; torch's generator gives the seeds."""
    tensors, weights, names, forms = [], [], [], []
    if any(layer.counter is not None for layer in layers):
        raise TypeError("masks that depend on a counter, for a CUDA graph, cannot be traced")
    every = op.tensors_of(layers)
    for i, layer in enumerate(layers):
        held, form = parts(layer.base.stored)
        there = [
            (name, t)
            for name, t in zip(NAMES, every[4 * i : 4 * i + 4], strict=True)
            if t is not None
        ]
        tensors += [t for _, t in there]
        names.append(" ".join([name for name, _ in there]))
        weights += held
        forms.append(form)
    scalings = [layer.scaling for layer in layers]
    seeds = [torch.randint(2**62, (), device="cpu") for rate in rates if rate]
    return Layers(tensors, weights, seeds, names, forms, scalings, rates)


def lora_qkv(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return the output of each of the `LoraWeights` for x [..., K]."""
    flat, rate = x.reshape(-1, x.shape[-1]), op.shared_dropout(layers)
    ys = torch.ops.lorakit.lora_qkv(flat, *_arguments(layers, [rate]))
    return tuple([y.view(*x.shape[:-1], y.shape[1]) for y in ys])


def lora_mlp(x: Tensor, layers: Sequence[Any], hidden_act: str, keep: bool) -> Tensor:
    """Return the output of an MLP for x [..., K]; the layers are gate, up and down."""
    flat, rates = x.reshape(-1, x.shape[-1]), [op.shared_dropout(layers[:2]), layers[2].dropout]
    keep = keep and torch.is_grad_enabled()
    y, *_ = torch.ops.lorakit.lora_mlp(flat, hidden_act, keep, *_arguments(layers, rates))
    return y.view(*x.shape[:-1], y.shape[1])
