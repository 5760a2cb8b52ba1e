"""The layers of one input with frozen products in float8 (`float8`); all else is `reference`'s.

x is rounded once for all layers that read it, and their dx is one product, as deep as all of them.
torch's product in float8 adds nothing to what is there already, so that the low-rank update is
added afterwards, in a pass over y or dx. The updates of gate and up are left to the activation,
which reads both in any case (`swiglu.updates`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import pretend
from ..float8 import Float8Weight, ScaledRows, product, product_back, scaled_rows
from ..products import Sum
from ..swiglu.updates import Update, adds_updates
from . import reference
from .tensors import Static


class Float8Layer(reference.DenseLayer):
    """One layer whose weight is multiplied in float8, with the weight itself for DoRA's norms."""

    rows: ScaledRows | None = None  # x, while a forward pass lasts
    out: Tensor | None = None  # where that pass wants y, or None for anywhere

    @property
    def float8(self) -> Float8Weight:
        """The weight."""
        stored = self.base.stored
        assert isinstance(stored, Float8Weight)
        return stored

    def product(self, x: Tensor, low: Tensor) -> Tensor:
        """Return x W^T + s low B^T, [M, N]."""
        return self.frozen_product(x).addmm_(low, self.sB.t())

    def frozen_product(self, x: Tensor) -> Tensor:
        """Return x W^T, [M, N]."""
        rows = scaled_rows([x], [None]) if self.rows is None else self.rows
        return product(rows, self.float8, self.out)


class Float8Group(reference.Group):
    """Layers that read one x, each with a `Float8Weight`."""

    layer_class = Float8Layer
    layers: list[Float8Layer]  # type: ignore[assignment]
    leaves = False  # whether `forward` leaves the updates to be added

    def leave_updates(self) -> None:
        """Let `forward` return y without updates from now on, where an activation can add them."""
        bare = all(layer.magnitude is None and layer.bias is None for layer in self.layers)
        in_line = all(layer.sB.is_contiguous() for layer in self.layers)  # else B is not
        autocast = pretend.autocasts(self.A.device)
        self.leaves = bare and in_line and not autocast and adds_updates(self.A, self.ranks)

    def left(self, x: Tensor) -> tuple[Update, Update] | None:
        """Return what gate and up of x [M, K] are without, if `forward` left it; or None."""
        if not self.leaves:
            return None
        (low0, low1), (gate, up) = self.low(x), self.layers
        return Update(low0, gate.sB), Update(low1, up.sB)

    def forward(self, x: Tensor, by_base: bool) -> list[Tensor]:
        """Return y [M, N] of each layer for x [M, K]; `by_base` makes no difference."""
        lows, rows = self.low(x), scaled_rows([x], [None])
        outs: Sequence[Tensor | None] = [None] * len(lows)
        if self.stacked is not None:  # so that what is made of them can be multiplied together
            outs = x.new_empty(len(lows), len(x), self.stacked.shape[1]).unbind()
        ys = []
        for layer, low, out in zip(self.layers, lows, outs, strict=True):
            layer.rows, layer.out = rows, out
            ys.append(layer.frozen_product(x) if self.leaves else layer.forward(x, low))
            layer.rows = layer.out = None
        return ys

    def grad_x(self, later: list[Sum], apart: bool = False) -> Tensor:
        """Return dx = dy W + s (dy B) A, summed over the layers: [M, K]; `apart`: dy W alone.

        `later` gets nothing.
        """
        dx = product_back(self.scaled, [layer.float8 for layer in self.layers])
        if apart:
            return dx
        if self.drop.rate:
            return dx.add_(self.drop(self.dlow @ self.A))
        return dx.addmm_(self.dlow, self.A)


def takes(static: Static, dtype: torch.dtype) -> bool:
    """Return whether the frozen products of these layers, on x of `dtype`, run in float8."""
    return dtype == torch.bfloat16 and all(
        isinstance(base.stored, Float8Weight) for base, _, _ in static
    )
