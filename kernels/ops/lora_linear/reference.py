"""The LoRA products and their backward in plain torch; `__init__.py` has the formulas.

A layer has M rows, K inputs and N outputs; r is its rank, R the sum of the ranks that are stacked.
"""

import functools
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch, pretend
from ..float8 import Float8Weight
from ..frozen_linear.dense import Panels, product, product_back, weight_panels
from ..products import Sum
from ..swiglu.updates import adds_updates
from .tensors import (
    TENSORS,
    Dropout,
    FrozenLinearMap,
    LoraTensors,
    Static,
    by_layer,
    stacked,
    widened,
)

MANY = 4096  # rows from which one reading of dy saves more than the calls of it cost
FEW = 128  # rows up to which a packed weight may be multiplied without making it dense
# torch.mm and addmm can return the fp32 sums of a product in 16 bits, on NVIDIA's GPUs.
_KEEPS_FP32 = torch.version.hip is None and (
    tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
)


CastPair = tuple[Tensor, Tensor]
"""A [r, K] and s B [N, r] of a layer, in the dtype that products are computed in."""


def cast_pairs(
    parts: Sequence[LoraTensors], scalings: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, list[CastPair]]:
    """Return A of all layers stacked [R, K], whose parts are those of the pairs, and the pairs.

    Where Triton runs, one launch casts all of them.
    """
    As, Bs = [part.lora_A for part in parts], [part.lora_B for part in parts]
    found = None
    if dispatch.triton_runs(As[0]) and dtype in dispatch.FLOATS:
        found = triton_kernels().cast(As, Bs, scalings, dtype)
    if found is None:
        A = torch.cat([a.to(dtype) for a in As])
        found = A, [(b * scaling).to(dtype) for b, scaling in zip(Bs, scalings, strict=True)]
    A, sBs = found
    return A, list(zip(A.split_with_sizes([a.shape[0] for a in As]), sBs, strict=True))


@functools.cache
def triton_kernels() -> ModuleType:
    """Return triton.py, where it is known that Triton is installed."""
    from . import triton

    return triton


def gradient(a: Tensor, b: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """Return scaling a b in `dtype`; on a GPU the product's sums are not rounded before that."""
    if pretend.kind_of(a.device) == "cpu" or not _KEEPS_FP32:
        found = (a @ b).to(dtype)
        return found if scaling == 1 else found * scaling
    shape, on = (a.shape[0], b.shape[1]), a.device
    unused = torch.empty(shape, dtype=dtype, device=on)  # beta = 0: it is not read
    if dtype == a.dtype:
        return torch.addmm(unused, a, b, beta=0, alpha=scaling)
    if dtype == torch.float32:
        return torch.addmm(unused, a, b, beta=0, alpha=scaling, out_dtype=dtype)
    return torch.addmm(unused.to(a.dtype), a, b, beta=0, alpha=scaling).to(dtype)


class DenseLayer:
    """One layer in one pass, forward or backward: what belongs to it in the compute dtype."""

    def __init__(self, base: FrozenLinearMap, scaling: float, tensors: LoraTensors, cast: CastPair):
        self.base, self.scaling = base, scaling
        self.lora_A, self.lora_B, self.bias, self.magnitude = tensors
        self.A, self.sB = cast
        self.dtype = self.A.dtype
        self.kept: Panels | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of lengths of rows: fp32, or a wider one that is computed in."""
        return torch.promote_types(self.dtype, torch.float32)

    def weight(self) -> Panels:
        """Return W [N, K] dense, in panels.

        On a GPU, where one panel is the whole, it is kept until the pass is over.
        """
        if self.kept is not None:
            return self.kept
        stored = self.base.stored
        stored = stored.stored if isinstance(stored, Float8Weight) else stored
        found = weight_panels(stored, self.dtype)
        if pretend.kind_of(self.lora_A.device) != "cpu":
            self.kept = found  # a list, there
        return found

    @cached_property
    def row_norms(self) -> Tensor:
        """||W + s B A|| of each row, [N] in fp32 or wider, from products of rank r."""
        A, sB = self.lora_A.to(self.wide), (self.lora_B * self.scaling).to(self.wide)
        square = (sB * (sB @ (A @ A.t()))).sum(1)
        for rows, W in self.weight():
            square[rows] += torch.linalg.vector_norm(W, dim=1, dtype=self.wide).square()
            square[rows] += 2 * (sB[rows] * F.linear(W, self.A).to(self.wide)).sum(1)  # @ [K, r]
        return square.clamp(min=0).sqrt()

    def gain(self, magnitude: Tensor) -> Tensor:
        """Return DoRA's g = m / c, [N]."""
        return (magnitude.to(self.wide) / self.row_norms).to(self.dtype)

    def product(self, x: Tensor, low: Tensor) -> Tensor:
        """Return x W^T + s low B^T, [M, N].

        On a GPU the small product comes first: the large one reads it while it computes.
        """
        if not dispatch.triton_runs(x):
            y = product(x, self.weight())
            return y.addmm_(low.to(y.dtype), self.sB.to(y.dtype).t())
        y = low @ self.sB.t()
        for rows, W in self.weight():
            y[:, rows].addmm_(x, W.t())
        return y

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        """Return y [M, N] of x [M, K] and low = d(x) A^T [M, r]."""
        y = self.product(x, low)
        if self.magnitude is not None:
            y *= self.gain(self.magnitude)
        if self.bias is not None:
            y += self.bias
        return y

    def forward_by_base(self, x: Tensor, low: Tensor) -> Tensor:
        """Return y as `forward` does, by calling the base.

        The base may have a better way than to make its whole weight dense.
        """
        if self.magnitude is not None or self.bias is not self.base.bias:
            return self.forward(x, low)
        autocast = pretend.autocasts(x.device)
        if x.shape[0] > FEW and self.bias is None and dispatch.triton_runs(x) and not autocast:
            y, self.kept = self.product(x, low), None
            return y
        y = self.base(x)
        # under autocast y is narrower than x; in place, as the base just made it
        return y.addmm_(low.to(y.dtype), self.sB.to(y.dtype).t())


class Group:
    """Layers that read one x, on one batch.

    A forward pass calls `forward`. A backward pass calls `take`, then `grad_x` and `grad_tensors`.
    What is small stays for it: A and s B in the compute dtype, and d(x) A^T.
    """

    layer_class = DenseLayer
    grads: Sequence[Tensor]  # dy [M, N] of each layer
    scaled: list[Tensor]  # the same times DoRA's gain
    together: Tensor | None  # the same as one tensor [n, M, N], if they lie so, or None
    dlow: Tensor  # s dy B of each layer, side by side [M, R]
    of_B: list[Tensor] | None  # dB of each layer, where dlow and these are made together

    def __init__(
        self,
        static: Static,
        drop: Dropout,
        tensors: Sequence[Any],
        dtype: torch.dtype,
        room: int = 0,
    ):
        self.dtype, self.drop, self.room = dtype, drop, room
        parts, scalings = by_layer(tensors), [scaling for _, scaling, _ in static]
        self.A, self.pairs = cast_pairs(parts, scalings, dtype)  # [R, K]
        self.layers = [
            self.layer_class(base, scaling, part, pair)
            for (base, scaling, _), part, pair in zip(static, parts, self.pairs, strict=True)
        ]
        self.ranks = [part.lora_A.shape[0] for part in parts]
        self.widths = [part.lora_B.shape[0] for part in parts]
        self.N, self.R = sum(self.widths), self.A.shape[0]
        self.lows: tuple[Tensor, ...] | None = None
        self.wide: Tensor | None = None  # [dy | dlow] of all layers, [M, N + room]
        self.weights: Tensor | None = None  # J of triton.py
        self.beside = False  # whether low lies beside the x of the forward pass
        self.stacked = self._stacked_sB()  # [n, N, r], or None

    def _stacked_sB(self) -> Tensor | None:
        """Return s B of all layers as one tensor [n, N, r], if they can be multiplied together.

        That is so on a GPU for gate and up of an MLP, which differ in nothing but their values.
        """
        first, *others = self.layers
        if not others:
            return None
        plain = all(each.magnitude is None and each.bias is None for each in self.layers)
        same = all(
            each.sB.shape == first.sB.shape and each.scaling == first.scaling for each in others
        )
        if not plain or not same or not dispatch.triton_runs(first.sB):
            return None
        return stacked([each.sB for each in self.layers])

    def low(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return d(x) A^T of each layer, [M, r]. It is kept: every call is for the same x."""
        if self.lows is None:
            K = x.shape[1]
            if self.beside and x.stride() == (K + self.room, 1):
                low = widened(x, K + self.room)[:, K : K + self.R]
            else:
                low = F.linear(self.drop(x), self.A)
            self.lows = low.split_with_sizes(self.ranks, dim=1)
        return self.lows

    def forward(self, x: Tensor, by_base: bool) -> list[Tensor]:
        """Return y [M, N] of each layer for x [M, K].

        It calls the bases, or takes the dense weights, which backward needs in any case.
        """
        if self.room:
            return self._forward_joined(x, by_base)
        if self.stacked is not None and x.shape[0] > FEW:
            return self._forward_together(x, self.stacked, by_base)
        lows = zip(self.layers, self.low(x), strict=True)
        if by_base:
            return [layer.forward_by_base(x, low) for layer, low in lows]
        return [layer.forward(x, low) for layer, low in lows]

    def _forward_together(self, x: Tensor, sB: Tensor, by_base: bool) -> list[Tensor]:
        """Return y of layers of one shape, which lie one after the other in one memory.

        Where the base could be called, as in a forward pass, no dense weight stays.
        """
        ys = torch.bmm(self._side_by_side(self.low(x)), sB.transpose(1, 2))
        for layer, y in zip(self.layers, ys, strict=True):
            for rows, W in layer.weight():
                y[:, rows].addmm_(x, W.t())
            if by_base:
                layer.kept = None
        return list(ys)

    def _joined(self) -> Tensor:
        """Return J [N + R, K + room], the weights and updates of all layers."""
        if self.weights is None:
            stored, sBs = [each.base.stored for each in self.layers], [s for _, s in self.pairs]
            self.weights = triton_kernels().join(stored, self.A, sBs, self.room)
        return self.weights

    def _forward_joined(self, x: Tensor, by_base: bool) -> list[Tensor]:
        """Return y of x [M, K] with room for low beside it.

        All y lie side by side in one memory; in backward with room for dlow beside them.
        """
        (M, K), N, R = x.shape, self.N, self.R
        roomy = x.stride() == (K + self.room, 1)
        if not roomy:  # computed again, without the room
            x = torch.cat([x, x.new_empty(M, self.room)], dim=1)[:, :K]
        wide = widened(x, K + self.room)[:, : K + R]
        low = wide[:, K:]
        if not roomy or not self.beside:
            torch.mm(self.drop(x), self.A.t(), out=low)
        self.lows, self.beside = low.split_with_sizes(self.ranks, dim=1), roomy
        columns = N if by_base else N + self.room
        y = torch.empty((M, columns), dtype=self.dtype, device=x.device)[:, :N]
        torch.mm(wide, self._joined()[:N, : K + R].t(), out=y)
        if by_base:
            self.weights = None
        ys = y.split_with_sizes(self.widths, dim=1)
        for layer, y in zip(self.layers, ys, strict=True):
            if layer.bias is not None:
                y += layer.bias
        # for autograd they are no views: what is done to one is its own
        return [y.data for y in ys]

    def _side_by_side(self, columns: Sequence[Tensor]) -> Tensor:
        """Return the columns [M, r] of each layer, parts of one [M, R], as a tensor [n, M, r]."""
        first = columns[0]
        shape, strides = (len(columns), *first.shape), (first.shape[1], *first.stride())
        return first.as_strided(shape, strides)

    def take(
        self,
        grads: Sequence[Tensor],
        small: list[Sum],
        wide: Tensor | None = None,
        x: Tensor | None = None,
    ) -> None:
        """Take the gradients dy [M, N] of each layer, from which the others follow.

        `small` gets nothing. They may be the first columns of `wide` [M, N + room]. x [M, K] is
        what low is found from, if it is not kept.
        """
        self.grads, self.wide, self.of_B = grads, wide, None
        self.scaled = [
            dy if layer.magnitude is None else dy * layer.gain(layer.magnitude)
            for layer, dy in zip(self.layers, grads, strict=True)
        ]
        if wide is None:
            self.dlow = grads[0].new_empty(grads[0].shape[0], self.A.shape[0])
            self.together = None if self.stacked is None else stacked(grads)
        else:
            self.dlow = wide[:, self.N : self.N + self.R]
            self.together = None if self.stacked is None else self._side_by_side(grads)
        if (x is not None or self.lows is not None) and self._reads_once():
            self._take_once(x)
            return
        columns = self.dlow.split_with_sizes(self.ranks, dim=1)
        if self.stacked is not None and self.together is not None:
            torch.bmm(self.together, self.stacked, out=self._side_by_side(columns))
            return
        for layer, dy, out in zip(self.layers, self.scaled, columns, strict=True):
            torch.mm(dy, layer.sB, out=out)  # s (dy B): [M, N] @ [N, r]

    def _reads_once(self) -> bool:
        """Return whether one reading of each dy gives its share of dlow, and dB."""
        if len(self.dlow) < MANY or not adds_updates(self.dlow, self.ranks):
            return False
        for layer, dy in zip(self.layers, self.scaled, strict=True):
            like = layer.lora_B.dtype == self.layers[0].lora_B.dtype in dispatch.FLOATS
            if not like or not layer.sB.is_contiguous() or dy.stride(1) != 1:
                return False
        return True

    def _take_once(self, x: Tensor | None) -> None:
        """Make dlow and dB for x [M, K], or for the low that is kept."""
        lows = self.lows if x is None else self.low(x)
        assert lows is not None  # that is when this is called
        M, strides = len(lows[0]), lows[0].stride()
        low = lows[0].as_strided((M, self.R), strides)  # they lie side by side
        sBs, scalings = [layer.sB for layer in self.layers], [each.scaling for each in self.layers]
        dtype = self.layers[0].lora_B.dtype
        self.of_B = triton_kernels().of_gradients(self.scaled, sBs, low, scalings, self.dlow, dtype)

    def grad_x(self, later: list[Sum], apart: bool = False) -> Tensor:
        """Return dx = dy W + s (dy B) A, summed over the layers: [M, K]; `apart`: dy W alone.

        `later` gets nothing.
        """
        if self.room:
            W = self._joined()[:, : self.A.shape[1]]
            if self.wide is not None and not self.drop.rate and not apart:
                return self.wide[:, : self.N + self.R] @ W
            each = W[: self.N].split_with_sizes(self.widths)
            for layer, rows in zip(self.layers, each, strict=True):
                layer.kept = [(slice(None), rows)]
        small_first = not self.drop.rate and not apart and dispatch.triton_runs(self.dlow)
        dx = self.dlow @ self.A if small_first else None
        for layer, dy in zip(self.layers, self.scaled, strict=True):
            dx = product_back(dy, layer.weight(), dx)
        assert dx is not None  # there is a layer
        if small_first or apart:
            return dx
        if self.drop.rate:
            return dx.add_(self.drop(self.dlow @ self.A))
        return dx.addmm_(self.dlow, self.A)

    def forget_weights(self) -> None:
        """Free the dense weights."""
        self.weights = None
        for layer in self.layers:
            layer.kept = None

    def rest(self, x_stays: bool) -> None:
        """Free what is as large as a weight or x until backward, after a forward pass.

        low may lie beside x. If x stays for backward, low is found there again, also beside an x
        that a second run of the forward pass has made. Else it is copied.
        """
        self.forget_weights()
        if not self.room or self.lows is None:
            return
        if not x_stays:
            self.lows = torch.cat(self.lows, dim=1).split_with_sizes(self.ranks, dim=1)
            self.beside = False
        else:
            self.lows = None

    def end(self) -> None:
        """Free what a backward pass has made; another pass makes it again."""
        self.forget_weights()
        self.together = self.lows = self.wide = self.of_B = None
        del self.grads, self.scaled, self.dlow

    def _gradients_together(self, lows: tuple[Tensor, ...]) -> Sequence[Tensor] | None:
        """Return dB = s dy^T (d(x) A^T) of each of layers of one shape, [N, r], or None."""
        B = self.layers[0].lora_B
        if self.together is None or B.dtype != torch.float32:
            return None
        if self.dtype != torch.float32 and (pretend.kind_of(B.device) == "cpu" or not _KEEPS_FP32):
            return None
        unused = torch.empty((len(lows), *B.shape), device=B.device)  # beta = 0: it is not read
        a, b, s = self.together.transpose(1, 2), self._side_by_side(lows), self.layers[0].scaling
        if self.dtype == torch.float32:
            return torch.baddbmm(unused, a, b, beta=0, alpha=s).unbind()
        return torch.baddbmm(unused, a, b, beta=0, alpha=s, out_dtype=torch.float32).unbind()

    def grad_tensors(
        self, x: Tensor, need: Sequence[bool], later: list[Sum]
    ) -> list[Tensor | None]:
        """Return the gradients of the small tensors of each layer, for x [M, K].

        `later` gets nothing.
        """
        found: list[Tensor | None] = [None] * len(need)
        if any(need[0::TENSORS]):
            # === dA = s (dy B)^T d(x), stacked: [R, M] @ [M, K] ===
            A = self.layers[0].lora_A
            dA = gradient(self.dlow.t(), self.drop(x), A.dtype)
            stacked = dA.split_with_sizes(self.ranks)
        if any(need[1::TENSORS]) or any(need[3::TENSORS]):
            lows = self.low(x)
            together = self.of_B or self._gradients_together(lows)
        for i, layer in enumerate(self.layers):
            at = TENSORS * i
            if need[at]:
                found[at] = stacked[i].to(layer.lora_A.dtype)
            if need[at + 1]:
                # === dB = s dy^T (d(x) A^T): [N, M] @ [M, r] ===
                dtype = layer.lora_B.dtype
                found[at + 1] = (
                    gradient(self.scaled[i].t(), lows[i], dtype, layer.scaling)
                    if together is None
                    else together[i]
                )
            if need[at + 2] and layer.bias is not None:
                found[at + 2] = self.grads[i].sum(0).to(layer.bias.dtype)
            if need[at + 3] and layer.magnitude is not None:
                through = (self.grads[i] * layer.product(x, lows[i])).sum(0, dtype=layer.wide)
                found[at + 3] = (through / layer.row_norms).to(layer.magnitude.dtype)
        return found
