"""The layers of one input as sums of products (`products`), where a compiled kernel takes them.

Forward is one call of two stages: all of x A^T, then all of y. So is backward: s dy B, then dx, dA
and dB, in which layers of another input may join. A and B are read as they are, in fp32; x A^T,
s dy B and the results are in the dtype of x, bf16 or fp32.

The gradients sum over the rows of x A^T and s dy B, and the update over their columns. So these are
written in both orders, by the call that makes them. dB is written by columns: its sum is of r rows,
and reads dy as it lies.

Updates of several adapters, each for rows of its own, are more terms of the same sums. The frozen
weight is laid out once for the rows of all. A row's sum takes its terms in the order in which it
takes them where one adapter is alone, and the gradients of an adapter sum over its own rows. So
what an adapter gets depends on no other, to the bit.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import pretend
from ..nf4 import NF4Tensor
from ..products import Sum, Term, available, dense_rows, sums_of_products, takes
from .tensors import TENSORS, Dropout, LoraTensors, Static, by_layer


class Place(NamedTuple):
    """The places of the products of an update with its rows."""

    rows: slice  # of x, that the update reads
    columns: slice  # its own in the products of its rows with all A, side by side
    pairs: slice  # the same, an even number of them: the last is zero if it is not the update's
    turned: slice  # its rows where these products lie turned
    even: slice  # the same, an even number of them


class StoredUpdate(NamedTuple):
    """A low-rank update in one pass, forward or backward."""

    scaling: float
    lora_A: Tensor
    lora_B: Tensor
    at: Place


class StoredLayer(NamedTuple):
    """One layer in one pass, with its weight as it is stored, and its updates."""

    weight: Tensor | NF4Tensor  # [N, K]
    bias: Tensor | None
    updates: list[StoredUpdate]


class Small(NamedTuple):
    """A product [rows, r] of each update, side by side, in both orders."""

    rows: Tensor  # [M, R]
    turned: Tensor  # [R, M], with a zero behind the rows of an adapter if they are odd


def takes_updates(x: Tensor, static: Static, tensors: Sequence[Any]) -> bool:
    """Return whether the kernel, where it is `available`, takes the layers for x [M, K]."""
    if not x.shape[0] or pretend.autocasts(x.device):
        return False
    if any(magnitude is not None for magnitude in tensors[3::TENSORS]):
        return False
    small = *tensors[0::TENSORS], *tensors[1::TENSORS]  # A and B of each update
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in small):
        return False
    return all(takes(base.stored) for base, _, _ in static)


def group(x: Tensor, static: Static, drop: Dropout, tensors: Sequence[Any]) -> "Group | None":
    """Return the layers for x [M, K], or None if the kernel does not take them."""
    if not available(x) or not takes_updates(x, static, tensors):
        return None
    parts = by_layer(tensors)
    updates = zip(static, parts, _places(len(x), static, parts), strict=True)
    layers: list[StoredLayer] = []
    for _, same in groupby(updates, lambda update: id(update[0][0])):
        found = list(same)
        (base, _, _), (_, _, bias, _), _ = found[0]
        weight = base.stored
        assert takes(weight)
        stored = [StoredUpdate(s, A, B, at) for (_, s, _), (A, B, _, _), at in found]
        layers.append(StoredLayer(weight, bias, stored))
    return Group(layers, drop, x.dtype)


def _places(M: int, static: Static, parts: Sequence[LoraTensors]) -> list[Place]:
    """Return the place of each update of M rows.

    Updates of other rows are of other adapters. They take the same columns.
    """
    found: list[Place] = []
    places: dict[tuple[int, int], int] = {}  # of an adapter's rows where they lie turned
    columns: dict[tuple[int, int], int] = {}  # how many are taken by its updates before
    total = 0
    for (_, _, own), part in zip(static, parts, strict=True):
        rows = slice(0, M) if own is None else own
        span, count = (rows.start, rows.stop), rows.stop - rows.start
        if span not in places:
            places[span], columns[span], total = total, 0, total + _even(count)
        start, place, r = columns[span], places[span], len(part.lora_A)
        columns[span] = start + _even(r)
        across = slice(start, start + r), slice(start, start + _even(r))
        along = slice(place, place + count), slice(place, place + _even(count))
        found.append(Place(rows, *across, *along))
    return found


class Group:
    """Layers that read one x, on one batch: `reference.Group` without dense weights."""

    grads: list[Tensor]  # dy [M, N] of each layer
    dlow: Small  # s dy B

    def __init__(self, layers: list[StoredLayer], drop: Dropout, dtype: torch.dtype):
        self.layers, self.drop, self.dtype = layers, drop, dtype  # of x and of what is computed
        self.lows: Small | None = None

    def _small(self, terms: Sequence[tuple[Term, float]], M: int, small: list[Sum]) -> Small:
        """Return factor times the product [rows, r] of each update, once `small` is run."""
        places = [update.at for layer in self.layers for update in layer.updates]
        like = terms[0][0].a
        odd = any(at.pairs != at.columns or at.even != at.turned for at in places)
        make = like.new_zeros if odd else like.new_empty
        R = max(at.pairs.stop for at in places)
        found = Small(make(M, R), make(R, max(at.even.stop for at in places)))
        for at, (term, factor) in zip(places, terms, strict=True):
            out, turned = found.rows[at.rows, at.columns], found.turned[at.columns, at.turned]
            small.append(Sum([term], out, factor, turned=turned))
        return found

    def low(self, x: Tensor, small: list[Sum]) -> Small:
        """Return d(x) A^T of each update, once `small` is run.

        It is kept: every call is for the same x.
        """
        if self.lows is None:
            x = self.drop(x)
            updates = [update for layer in self.layers for update in layer.updates]
            terms = [(Term(x[each.at.rows], each.lora_A, True), 1.0) for each in updates]
            self.lows = self._small(terms, len(x), small)
        return self.lows

    def forward(self, x: Tensor, by_base: bool) -> list[Tensor]:
        """Return y = x W^T + s low B^T + b of each layer, [M, N], for x [M, K].

        The bases are never called; `by_base` makes no difference.
        """
        x = dense_rows(x)
        small: list[Sum] = []
        low, sums, ys = self.low(x, small).rows, [], []
        for weight, layer_bias, updates in self.layers:
            y = x.new_empty(x.shape[0], weight.shape[0])
            terms = [Term(x, weight, True)]
            for scaling, _, B, at in updates:
                terms.append(Term(low[at.rows, at.pairs], B, True, scaling, at.rows.start))
            bias = None if layer_bias is None else layer_bias.float()
            sums.append(Sum(terms, y, bias=bias))
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
        # s dy B: [rows, N] @ [N, r]
        terms = [(Term(dy[at.rows], B, False), s) for (s, _, B, at), dy in self._both()]
        self.dlow = self._small(terms, len(grads[0]), small)
        if self.drop.rate:  # dx is more than sums then
            sums_of_products(small)
            small.clear()

    def grad_x(self, later: list[Sum]) -> Tensor:
        """Return dx = dy W + s (dy B) A, summed over the layers: [M, K], once `later` is run."""
        dlow = self.dlow.rows
        both = list(zip(self.layers, self.grads, strict=True))
        dx = dlow.new_empty(dlow.shape[0], both[0][0].weight.shape[1])
        terms = [Term(dy, layer.weight, False) for layer, dy in both]
        update = [
            Term(dlow[at.rows, at.pairs], A, False, start=at.rows.start)
            for (_, A, _, at), _ in self._both()
        ]
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
        """Return the gradients of the small tensors of each update, for x [M, K].

        They are there once `later` is run.
        """
        x = dense_rows(x)
        found: list[Tensor | None] = [None] * len(need)
        dropped, dlow = self.drop(x), self.dlow.turned
        if any(need[1::TENSORS]):
            missing: list[Sum] = []
            low = self.low(x, missing).turned
            sums_of_products(missing)
        for i, ((scaling, A, B, at), dy) in enumerate(self._both()):
            mine = TENSORS * i
            if need[mine]:  # s (dy B)^T d(x): [r, rows] @ [rows, K]
                grad_A = found[mine] = torch.empty_like(A)
                term = Term(dlow[at.columns, at.even], dropped[at.rows], False)
                later.append(Sum([term], grad_A))
            if need[mine + 1]:  # its transpose, s (d(x) A^T)^T dy: [r, rows] @ [rows, N]
                grad_B = found[mine + 1] = torch.empty_like(B)
                term = Term(low[at.columns, at.even], dy[at.rows], False)
                later.append(Sum([term], None, scaling, turned=grad_B))
        first = 2  # the place of a layer's bias is that of its first update
        for layer, dy in zip(self.layers, self.grads, strict=True):
            if need[first] and layer.bias is not None:
                found[first] = dy.sum(0, dtype=torch.float32).to(layer.bias.dtype)
            first += TENSORS * len(layer.updates)
        return found

    def _both(self) -> Iterator[tuple[StoredUpdate, Tensor]]:
        """Yield each update with its layer's dy."""
        for layer, dy in zip(self.layers, self.grads, strict=True):
            for update in layer.updates:
                yield update, dy


def _even(n: int) -> int:
    return n + n % 2
