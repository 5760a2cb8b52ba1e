"""The layers of one input as sums of products (`products`), where a compiled kernel takes them.

Forward is two calls: all of x A^T, then all of y. Backward is one for s dy B, one for dx, and one
for dA and dB. A and B are read as they are, in fp32;
x A^T, s dy B and the results are in the dtype of x, bf16 or fp32.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    start: int  # its first column in the products of x with all A, side by side

    @property
    def columns(self) -> slice:
        """Its columns there."""
        return slice(self.start, self.start + self.lora_A.shape[0])

    @property
    def pairs(self) -> slice:
        """Its columns, an even number of them: the last is zero if it is not the layer's."""
        return slice(self.start, self.start + _even(self.lora_A.shape[0]))


def group(x: Tensor, static: Static, drop: Dropout, tensors: Sequence[Any]) -> "Group | None":
    """Return the layers for x [M, K], or None if the kernel does not take them."""
    if not available(x) or not x.shape[0] or torch.is_autocast_enabled("cpu"):
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
        layers.append(StoredLayer(weight, scaling, part.lora_A, part.lora_B, part.bias, start))
        start = layers[-1].pairs.stop
    return Group(layers, drop, x.dtype)


class Group:
    """Layers that read one x, on one batch: `reference.Group` without dense weights."""

    grads: list[Tensor]  # dy [M, N] of each layer
    dlow: Tensor  # s dy B of each layer, side by side

    def __init__(self, layers: list[StoredLayer], drop: Dropout, dtype: torch.dtype):
        self.layers, self.drop, self.dtype = layers, drop, dtype  # of x and of what is computed
        self.lows: Tensor | None = None

    def _side_by_side(self, x: Tensor) -> Tensor:
        """Return room for [M, r] of each layer."""
        odd = any(layer.lora_A.shape[0] % 2 for layer in self.layers)
        make = x.new_zeros if odd else x.new_empty
        return make(x.shape[0], self.layers[-1].pairs.stop)

    def low(self, x: Tensor) -> Tensor:
        """Return d(x) A^T of each layer, side by side. It is kept: every call is for the same x."""
        if self.lows is None:
            dropped, low = self.drop(x), self._side_by_side(x)
            sums_of_products(
                [Sum([Term(dropped, e.lora_A, True)], low[:, e.columns]) for e in self.layers]
            )
            self.lows = low
        return self.lows

    def forward(self, x: Tensor, by_base: bool) -> list[Tensor]:
        """Return y = x W^T + s low B^T + b of each layer, [M, N], for x [M, K].

        The bases are never called; `by_base` makes no difference.
        """
        x = dense_rows(x)
        low, sums = self.low(x), []
        for layer in self.layers:
            y = x.new_empty(x.shape[0], layer.lora_B.shape[0])
            update = Term(low[:, layer.pairs], layer.lora_B, True, layer.scaling)
            bias = None if layer.bias is None else layer.bias.float()
            sums.append(Sum([Term(x, layer.weight, True), update], y, bias=bias))
        sums_of_products(sums)
        return [each.out for each in sums]

    def take(self, grads: Sequence[Tensor], wide: None = None) -> None:
        """Take the gradients dy [M, N] of each layer, from which the others follow."""
        self.grads = [dense_rows(dy) for dy in grads]
        self.dlow, sums = self._side_by_side(self.grads[0]), []
        for layer, dy in self._both():  # s dy B: [M, N] @ [N, r]
            terms, out = [Term(dy, layer.lora_B, False)], self.dlow[:, layer.columns]
            sums.append(Sum(terms, out, layer.scaling))
        sums_of_products(sums)

    def grad_x(self) -> Tensor:
        """Return dx = dy W + s (dy B) A, summed over the layers: [M, K]."""
        dx = self.dlow.new_empty(self.dlow.shape[0], self.layers[0].lora_A.shape[1])
        terms = [Term(dy, layer.weight, False) for layer, dy in self._both()]
        update = [Term(self.dlow[:, each.pairs], each.lora_A, False) for each in self.layers]
        if not self.drop.rate:
            sums_of_products([Sum(terms + update, dx)])
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

    def grad_tensors(self, x: Tensor, need: Sequence[bool]) -> list[Tensor | None]:
        """Return the gradients of the small tensors of each layer, for x [M, K]."""
        x = dense_rows(x)
        found: list[Tensor | None] = [None] * len(need)
        dropped, dlow, sums = self.drop(x), _turned(self.dlow), []
        if any(need[1::TENSORS]):
            low = _turned(self.low(x))
        for i, (layer, dy) in enumerate(self._both()):
            at = TENSORS * i
            if need[at]:  # s (dy B)^T d(x): [r, M] @ [M, K]
                grad_A = found[at] = torch.empty_like(layer.lora_A)
                sums.append(Sum([Term(dlow[layer.columns], dropped, False)], grad_A))
            if need[at + 1]:  # its transpose, s (d(x) A^T)^T dy: [r, M] @ [M, N]
                turned = torch.empty(layer.lora_B.shape[::-1], device=x.device)
                sums.append(Sum([Term(low[layer.columns], dy, False)], turned, layer.scaling))
                found[at + 1] = turned.t()
            if need[at + 2] and layer.bias is not None:
                found[at + 2] = dy.sum(0, dtype=torch.float32).to(layer.bias.dtype)
        sums_of_products(sums)
        return found

    def _both(self) -> Iterator[tuple[StoredLayer, Tensor]]:
        """Yield each layer with its dy."""
        return zip(self.layers, self.grads, strict=True)


def _even(n: int) -> int:
    return n + n % 2


def _turned(x: Tensor) -> Tensor:
    """Return x [M, R] by columns, with a zero at the end of each if M is odd: [R, M or M + 1]."""
    turned = x.new_zeros(x.shape[1], _even(x.shape[0]))
    turned[:, : x.shape[0]] = x.t()
    return turned
