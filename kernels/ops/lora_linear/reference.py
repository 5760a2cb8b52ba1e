"""The LoRA products and their backward in plain torch; `__init__.py` has the formulas.

A layer has M rows, K inputs and N outputs; r is its rank, R the sum of the ranks that are stacked.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..frozen_linear.dense import Panels, product, product_back, weight_panels
from .tensors import TENSORS, Dropout, FrozenLinearMap, LoraTensors, Static, by_layer


class DenseLayer:
    """One layer in one pass, forward or backward: what belongs to it in the compute dtype."""

    def __init__(
        self, base: FrozenLinearMap, scaling: float, tensors: LoraTensors, dtype: torch.dtype
    ):
        self.base, self.scaling = base, scaling
        self.lora_A, self.lora_B, self.bias, self.magnitude = tensors
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.A = self.lora_A.to(dtype)
        self.sB = (self.lora_B * self.scaling).to(dtype)
        self.kept: Panels | None = None

    def weight(self) -> Panels:
        """Return W [N, K] dense, in panels.

        On a GPU, where one panel is the whole, it is kept until the pass is over.
        """
        if self.kept is not None:
            return self.kept
        found = weight_panels(self.base.stored, self.dtype)
        if self.lora_A.device.type == "cpu":
            return found
        self.kept = list(found)
        return self.kept

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
        """Return x W^T + s low B^T, [M, N]."""
        y = product(x, self.weight())
        return y.addmm_(low.to(y.dtype), self.sB.to(y.dtype).t())

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
        y = self.base(x)
        # under autocast y is narrower than x; in place, as the base just made it
        return y.addmm_(low.to(y.dtype), self.sB.to(y.dtype).t())


class Group:
    """Layers that read one x, in one pass.

    A forward pass calls `forward`. A backward pass calls `take`, then `grad_x` and `grad_tensors`.
    """

    grads: Sequence[Tensor]  # dy [M, N] of each layer
    scaled: list[Tensor]  # the same times DoRA's gain
    dlow: Tensor  # s dy B of each layer, side by side [M, R]

    def __init__(self, static: Static, drop: Dropout, tensors: Sequence[Any], dtype: torch.dtype):
        self.dtype = dtype
        self.layers = [
            DenseLayer(base, scaling, part, dtype)
            for (base, scaling), part in zip(static, by_layer(tensors), strict=True)
        ]
        self.drop = drop
        self.ranks = [len(layer.A) for layer in self.layers]
        self.A = torch.cat([layer.A for layer in self.layers])  # [R, K]

    def low(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return d(x) A^T of each layer, [M, r]."""
        return F.linear(self.drop(x), self.A).split(self.ranks, dim=1)

    def forward(self, x: Tensor, by_base: bool) -> list[Tensor]:
        """Return y [M, N] of each layer for x [M, K].

        It calls the bases, or takes the dense weights, which backward needs in any case.
        """
        lows = zip(self.layers, self.low(x), strict=True)
        if by_base:
            return [layer.forward_by_base(x, low) for layer, low in lows]
        return [layer.forward(x, low) for layer, low in lows]

    def take(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients dy [M, N] of each layer, from which the others follow."""
        self.grads = grads
        self.scaled = [
            dy if layer.magnitude is None else dy * layer.gain(layer.magnitude)
            for layer, dy in zip(self.layers, grads, strict=True)
        ]
        # s (dy B) of each layer: [M, N] @ [N, r], side by side [M, R]
        both = zip(self.layers, self.scaled, strict=True)
        self.dlow = torch.cat([dy @ layer.sB for layer, dy in both], dim=1)

    def grad_x(self) -> Tensor:
        """Return dx = dy W + s (dy B) A, summed over the layers: [M, K]."""
        dx: Tensor | None = None
        for layer, dy in zip(self.layers, self.scaled, strict=True):
            dx = product_back(dy, layer.weight(), dx)
        assert dx is not None  # there is a layer
        if self.drop.rate:
            return dx.add_(self.drop(self.dlow @ self.A))
        return dx.addmm_(self.dlow, self.A)

    def forget_weights(self) -> None:
        """Free the dense weights."""
        for layer in self.layers:
            layer.kept = None

    def grad_tensors(self, x: Tensor, need: Sequence[bool]) -> list[Tensor | None]:
        """Return the gradients of the small tensors of each layer, for x [M, K]."""
        found: list[Tensor | None] = [None] * len(need)
        if any(need[0::TENSORS]):
            # === dA = s (dy B)^T d(x), stacked: [R, M] @ [M, K] ===
            stacked = (self.dlow.t() @ self.drop(x)).split(self.ranks)
        if any(need[1::TENSORS]) or any(need[3::TENSORS]):
            lows = self.low(x)
        for i, layer in enumerate(self.layers):
            at = TENSORS * i
            if need[at]:
                found[at] = stacked[i].to(layer.lora_A.dtype)
            if need[at + 1]:
                # === dB = s dy^T (d(x) A^T): [N, M] @ [M, r] ===
                grad = (self.scaled[i].t() @ lows[i]).to(layer.lora_B.dtype)
                found[at + 1] = grad * layer.scaling
            if need[at + 2] and layer.bias is not None:
                found[at + 2] = self.grads[i].sum(0).to(layer.bias.dtype)
            if need[at + 3] and layer.magnitude is not None:
                through = (self.grads[i] * layer.product(x, lows[i])).sum(0, dtype=layer.wide)
                found[at + 3] = (through / layer.row_norms).to(layer.magnitude.dtype)
        return found
