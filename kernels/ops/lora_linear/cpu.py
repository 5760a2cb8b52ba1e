"""The layers of one input as sums of products (`products`), where a compiled kernel takes them.

Forward is one call of two stages: all of x A^T, then all of y. So is backward: s dy B, then dx, dA
and dB, in which layers of another input may join. A and B are read as they are, in fp32; x A^T,
s dy B and the results are in the dtype of x, bf16 or fp32.

The gradients sum over the rows of x A^T and s dy B, and the update over their columns. So these are
written in both orders, by the call that makes them. dB is written by columns: its sum is of r rows,
and reads dy as it lies.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import pretend
from ..nf4 import NF4Tensor
from ..products import Sum, Term, available, dense_rows, sums_of_products, takes
from .tensors import TENSORS, Dropout, Static, by_layer


class StoredLayer(NamedTuple):
    """One layer in one pass, forward or backward, with its weight as it is stored."""

    weight: Tensor | NF4Tensor  # [N, K]
    scaling: float
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    columns: slice  # its own in the products of x with all A, side by side
    pairs: slice  # the same, an even number of them: the last is zero if it is not the layer's


class Small(NamedTuple):
    """A product [M, r] of each layer, side by side [M, R], in both orders."""

    rows: Tensor  # [M, R]
    turned: Tensor  # [R, M], with a zero at the end of each row if M is odd


def group(x: Tensor, static: Static, drop: Dropout, tensors: Sequence[Any]) -> "Group | None":
    """Return the layers for x [M, K], or None if the kernel does not take them."""
    if not available(x) or not x.shape[0] or pretend.autocasts(x.device):
        return None
    if any(magnitude is not None for magnitude in tensors[3::TENSORS]):
        return None
    small = *tensors[0::TENSORS], *tensors[1::TENSORS]  # A and B of each layer
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in small):
        return None
    layers: list[StoredLayer] = []
    start = 0
    for (base, scaling), part in zip(static, by_layer(tensors), strict=True):
        weight = base.stored
        if not takes(weight):
            return None
        end = start + len(part.lora_A)
        columns, pairs = slice(start, end), slice(start, start + _even(end - start))
        A, B, bias, _ = part
        layers.append(StoredLayer(weight, scaling, A, B, bias, columns, pairs))
        start = pairs.stop
    return Group(layers, drop, x.dtype)


class Group:
    """Layers that read one x, on one batch: `reference.Group` without dense weights."""

    grads: list[Tensor]  # dy [M, N] of each layer
    dlow: Small  # s dy B

    def __init__(self, layers: list[StoredLayer], drop: Dropout, dtype: torch.dtype):
        self.layers, self.drop, self.dtype = layers, drop, dtype  # of x and of what is computed
        self.lows: Small | None = None

    def _small(self, terms: Sequence[tuple[Term, float]], small: list[Sum]) -> Small:
        """Return factor times the product [M, r] of each layer, once `small` is run."""
        a = terms[0][0].a
        M, R = a.shape[0], self.layers[-1].pairs.stop
        odd = M % 2 or any(layer.lora_A.shape[0] % 2 for layer in self.layers)
        make = a.new_zeros if odd else a.new_empty
        found = Small(make(M, R), make(R, _even(M)))
        rows = found.turned[:, :M]
        for layer, (term, factor) in zip(self.layers, terms, strict=True):
            at = layer.columns
            small.append(Sum([term], found.rows[:, at], factor, turned=rows[at]))
        return found

    def low(self, x: Tensor, small: list[Sum]) -> Small:
        """Return d(x) A^T of each layer, once `small` is run.

        It is kept: every call is for the same x.
        """
        if self.lows is None:
            x = self.drop(x)
            terms = [(Term(x, each.lora_A, True), 1.0) for each in self.layers]
            self.lows = self._small(terms, small)
        return self.lows

    def forward(self, x: Tensor, by_base: bool) -> list[Tensor]:
        """Return y = x W^T + s low B^T + b of each layer, [M, N], for x [M, K].

        The bases are never called; `by_base` makes no difference.
        """
        x = dense_rows(x)
        small: list[Sum] = []
        low, sums, ys = self.low(x, small).rows, [], []
        for layer in self.layers:
            y = x.new_empty(x.shape[0], layer.lora_B.shape[0])
            update = Term(low[:, layer.pairs], layer.lora_B, True, layer.scaling)
            bias = None if layer.bias is None else layer.bias.float()
            sums.append(Sum([Term(x, layer.weight, True), update], y, bias=bias))
            ys.append(y)
        sums_of_products(small, sums)
        return ys

    def take(
        self,
        grads: Sequence[Tensor],
        small: list[Sum],
        wide: None = None,
        x: Tensor | None = None,
    ) -> None:
        """Take the gradients dy [M, N] of each layer, from which the others follow.

        `small` has to be run before what `grad_x` and `grad_tensors` leave. x is not needed.
        """
        self.grads = [dense_rows(dy) for dy in grads]
        # s dy B: [M, N] @ [N, r]
        terms = [(Term(dy, layer.lora_B, False), layer.scaling) for layer, dy in self._both()]
        self.dlow = self._small(terms, small)
        if self.drop.rate:  # dx is more than sums then
            sums_of_products(small)
            small.clear()

    def grad_x(self, later: list[Sum]) -> Tensor:
        """Return dx = dy W + s (dy B) A, summed over the layers: [M, K], once `later` is run."""
        dlow = self.dlow.rows
        dx = dlow.new_empty(dlow.shape[0], self.layers[0].lora_A.shape[1])
        terms = [Term(dy, layer.weight, False) for layer, dy in self._both()]
        update = [Term(dlow[:, each.pairs], each.lora_A, False) for each in self.layers]
        if not self.drop.rate:
            later.append(Sum(terms + update, dx))
            return dx
        through = torch.empty_like(dx)
        sums_of_products([Sum(terms, dx), Sum(update, through)])
        return dx.add_(self.drop(through))

    def forget_weights(self) -> None:
        """Do nothing: there are no dense weights."""

    def rest(self, x_stays: bool) -> None:
        """Do nothing: what a forward pass has left is small."""

    def end(self) -> None:
        """Free what a backward pass has made; another pass makes it again."""
        self.lows = None
        del self.grads, self.dlow

    def grad_tensors(
        self, x: Tensor, need: Sequence[bool], later: list[Sum]
    ) -> list[Tensor | None]:
        """Return the gradients of the small tensors of each layer, for x [M, K].

        They are there once `later` is run.
        """
        x = dense_rows(x)
        found: list[Tensor | None] = [None] * len(need)
        dropped, dlow = self.drop(x), self.dlow.turned
        if any(need[1::TENSORS]):
            missing: list[Sum] = []
            low = self.low(x, missing).turned
            sums_of_products(missing)
        for i, (layer, dy) in enumerate(self._both()):
            at = TENSORS * i
            if need[at]:  # s (dy B)^T d(x): [r, M] @ [M, K]
                grad_A = found[at] = torch.empty_like(layer.lora_A)
                later.append(Sum([Term(dlow[layer.columns], dropped, False)], grad_A))
            if need[at + 1]:  # its transpose, s (d(x) A^T)^T dy: [r, M] @ [M, N]
                grad_B = found[at + 1] = torch.empty_like(layer.lora_B)
                terms = [Term(low[layer.columns], dy, False)]
                later.append(Sum(terms, None, layer.scaling, turned=grad_B))
            if need[at + 2] and layer.bias is not None:
                found[at + 2] = dy.sum(0, dtype=torch.float32).to(layer.bias.dtype)
        return found

    def _both(self) -> Iterator[tuple[StoredLayer, Tensor]]:
        """Yield each layer with its dy."""
        return zip(self.layers, self.grads, strict=True)


def _even(n: int) -> int:
    return n + n % 2
