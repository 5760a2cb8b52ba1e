"""The MLPs of all experts on a GPU, forward and backward, by `triton`'s products by groups."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...autograd import once_differentiable, without_autocast
from .. import swiglu
from . import triton
from .layers import ExpertLayers, Groups, weights

CLAMPED = "swiglu_oai"  # the activation whose product is not linear in up


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """Return matrices [rows, columns] times s in `dtype`, one after the other in new memory."""
    found = torch.cat(list(matrices))
    return (found if scaling == 1 else found.mul_(scaling)).to(dtype)


class Group:
    """Layers of all experts that read one x [M, K], whose rows are grouped, in one pass.

    A forward pass calls `forward`. A backward pass calls `take`, then `grad_x` and `grad_tensors`.
    `low`, x A^T of all layers side by side [M, R], may be kept from one pass to the other.
    """

    grads: Sequence[Tensor]  # dy [M, N] of each layer
    dlow: Tensor | None  # s dy B of each layer, side by side [M, R]

    def __init__(
        self, layers: Sequence[ExpertLayers], bounds: Tensor, dtype: torch.dtype,
        low: Tensor | None = None,
    ):  # fmt: skip
        self.layers, self.bounds, self.dtype, self.low = layers, bounds, dtype, low
        experts = len(bounds) - 1
        self.A: Tensor | None = None  # [E, R, K], the layers' one below the other
        adapted = [layer.lora_A for layer in layers if layer.lora_A]
        if adapted:
            A = _stacked([a for of_expert in zip(*adapted, strict=True) for a in of_expert], dtype)
            self.A = A.view(experts, -1, A.shape[1])
        self.sB: list[Tensor | None] = []  # [E, N, r] of each layer
        self.columns: list[slice] = []  # of each layer in `low`
        for layer in layers:
            start, r = self.columns[-1].stop if self.columns else 0, 0
            sB = None
            if layer.lora_B:
                sB = _stacked(layer.lora_B, dtype, layer.scaling)
                sB, r = sB.view(experts, -1, sB.shape[1]), sB.shape[1]
            self.sB.append(sB)
            self.columns.append(slice(start, start + r))

    def forward(self, x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return y [M, N] of each layer for x [M, K], with biases times `factors` [M, 1]."""
        if self.A is not None and self.low is None:
            self.low = x.new_empty(len(x), self.A.shape[1])
            triton.rows(x, self.A, self.bounds, self.low)
        found = []
        for i, layer in enumerate(self.layers):
            y, bias = x.new_empty(len(x), layer.stored[0].shape[0]), self._bias(layer)
            for some, W in weights(layer.stored, self.dtype):
                low, sB = self._small(i, some, self.low, self.sB[i])
                own = None if bias is None else bias[some]
                triton.rows(x, W, self._bounds(some), y, low, sB, bias=own, factors=factors)
            found.append(y)
        return tuple(found)

    def take(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients dy [M, N] of each layer, from which the others follow."""
        self.grads, self.dlow = grads, None
        if self.A is None:
            return
        self.dlow = grads[0].new_empty(len(grads[0]), self.A.shape[1])
        for dy, sB, columns in zip(grads, self.sB, self.columns, strict=True):
            if sB is not None:
                triton.rows(dy, sB, self.bounds, self.dlow[:, columns], transposed=True)

    def grad_x(self) -> Tensor:
        """Return dx = dy W + s (dy B) A, summed over the layers: [M, K]."""
        dx = self.grads[0].new_empty(len(self.grads[0]), self.layers[0].stored[0].shape[1])
        for i, (layer, dy) in enumerate(zip(self.layers, self.grads, strict=True)):
            A = None if self.A is None else self.A[:, self.columns[i]]
            for some, W in weights(layer.stored, self.dtype):
                low, small = self._small(i, some, self.dlow, A)
                bounds, adds = self._bounds(some), i > 0
                triton.rows(dy, W, bounds, dx, low, small, transposed=True, adds=adds)
        return dx

    def grad_tensors(self, x: Tensor) -> list[Tensor]:
        """Return the gradients of A and of B of all experts, layer after layer, for x [M, K]."""
        found: list[Tensor] = []
        if self.dlow is None or self.low is None:
            return found
        dtype = next(layer.lora_A[0].dtype for layer in self.layers if layer.lora_A)
        dA = triton.columns(self.dlow, x, self.bounds, dtype, 1.0)  # [E, R, K]
        for layer, dy, columns in zip(self.layers, self.grads, self.columns, strict=True):
            if layer.lora_B:
                low, dtype = self.low[:, columns], layer.lora_B[0].dtype
                found += dA[:, columns].to(layer.lora_A[0].dtype).unbind()
                found += triton.columns(dy, low, self.bounds, dtype, layer.scaling).unbind()
        return found

    def along_bias(self) -> Tensor | None:
        """Return dy . bias of each row, fp32 [M, 1], of the only layer; None if it has no bias."""
        [layer], [dy] = self.layers, self.grads
        bias = self._bias(layer)
        if bias is None:
            return None
        found = dy.new_empty((len(dy), 1), dtype=torch.float32)
        triton.rows(dy, bias[:, None], self.bounds, found)
        return found

    def _bias(self, layer: ExpertLayers) -> Tensor | None:
        """Return the biases of a layer [E, N], or None."""
        if not layer.bias:
            return None
        return _stacked([each[None] for each in layer.bias], self.dtype)

    def _bounds(self, some: slice) -> Tensor:
        return self.bounds[some.start : some.stop + 1]

    def _small(
        self, i: int, some: slice, low: Tensor | None, small: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the columns of `low` that belong to layer i, and what some experts multiply."""
        if low is None or self.sB[i] is None or small is None:
            return None, None
        return low[:, self.columns[i]], small[some]


def tensors(layers: Sequence[ExpertLayers]) -> list[Tensor]:
    """Return what autograd sees of the layers: all A and all B of each, side by side."""
    return [t for layer in layers for t in (*layer.lora_A, *layer.lora_B)]


class ExpertMLP(torch.autograd.Function):
    """Map x [n, K] and the weights of the picks [n, k] to the weighed sum of the experts [n, N].

    The weights multiply the hidden state: W h w = W (h w), and the bias. So their gradients need no
    output of `down`. Backward keeps x alone, the low-rank products, and with `keep` gate and up.
    """

    @staticmethod
    def forward(ctx, x, weights, groups, layers, hidden_act, keep, *tensors):
        weight = weights.flatten().index_select(0, groups.order)[:, None]
        inner, outer = ExpertMLP._split(layers, tensors)
        first = Group(inner, groups.bounds, x.dtype)
        second = Group(outer, groups.bounds, x.dtype)
        gate, up = first.forward(x.index_select(0, groups.tokens))
        hidden = swiglu.gated(gate, up, hidden_act).mul_(weight)
        (y,) = second.forward(hidden, weight)
        kept = (gate, up) if keep else (None, None)
        ctx.save_for_backward(x, weight, *groups, first.low, second.low, *kept, *tensors)
        ctx.layers = [dataclasses.replace(each, lora_A=(), lora_B=()) for each in layers]
        ctx.adapted, ctx.hidden_act = [bool(each.lora_A) for each in layers], hidden_act
        return triton.summed(y, groups.places)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        x, weight, *saved = ctx.saved_tensors
        groups, tensors = Groups(*saved[:4]), saved[8:]
        low, low_of_hidden, gate, up = saved[4:8]
        inner, outer = ExpertMLP._split(ctx.layers, tensors, ctx.adapted)
        first = Group(inner, groups.bounds, x.dtype, low)
        second = Group(outer, groups.bounds, x.dtype, low_of_hidden)
        rows = x.index_select(0, groups.tokens)
        kept = gate is not None
        if not kept:
            gate, up = first.forward(rows)
        second.take([grad.index_select(0, groups.tokens)])
        hidden = second.grad_x()  # the gradient of h w; h goes over it
        into = torch.empty_like(gate) if kept else gate, torch.empty_like(up)
        dweights = dweight = None
        if ctx.needs_input_grad[1] and ctx.hidden_act == CLAMPED:
            dweight = (hidden * swiglu.gated(gate, up, CLAMPED)).sum(1, dtype=weight.dtype)
        swiglu.gated_backward_(hidden, gate, up, ctx.hidden_act, into)
        if ctx.needs_input_grad[1]:
            if dweight is None:  # dh . h = d(a(gate) up) . a(gate) up = dup . up
                dweight = (into[1] * up).sum(1, dtype=weight.dtype)
            along = second.along_bias()
            dweight = dweight if along is None else dweight + along[:, 0]
            dweights = dweight.index_select(0, groups.places.flatten()).view(groups.places.shape)
        for t in (hidden, *into):
            t.mul_(weight)
        first.take(into)
        dx = triton.summed(first.grad_x(), groups.places) if ctx.needs_input_grad[0] else None
        found = [*first.grad_tensors(rows), *second.grad_tensors(hidden)]
        return dx, dweights, None, None, None, None, *found

    @staticmethod
    def _split(
        layers: Sequence[ExpertLayers],
        tensors: Sequence[Any],
        adapted: Sequence[bool] | None = None,
    ) -> tuple[list[ExpertLayers], list[ExpertLayers]]:
        """Return gate and up, and down, with their part of `tensors`."""
        found, start = [], 0
        for i, layer in enumerate(layers):
            experts = len(layer.stored) if (adapted[i] if adapted else layer.lora_A) else 0
            A, B = tensors[start : start + experts], tensors[start + experts : start + 2 * experts]
            found.append(dataclasses.replace(layer, lora_A=A, lora_B=B))
            start += 2 * experts
        return found[:2], found[2:]
