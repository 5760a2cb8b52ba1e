"""The LoRA products and their backward in plain torch. Formulas: see the package.

M rows, K inputs and N outputs of a layer, r its rank, R the sum of the ranks that are stacked.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..frozen_linear.dense import Panels, product, product_back, weight_panels

TENSORS = 4  # of a layer: A, B, the bias, DoRA's magnitude


class Dropout(NamedTuple):
    """A mask that can be drawn again."""

    rate: float
    seed: int

    def __call__(self, x: Tensor) -> Tensor:
        if self.rate == 0:
            return x
        if self.rate == 1:
            return torch.zeros_like(x)
        generator = torch.Generator(x.device).manual_seed(self.seed)
        # row-major whatever the strides of x are: backward draws it again for another tensor
        mask = torch.empty_like(x, memory_format=torch.contiguous_format)
        mask.bernoulli_(1 - self.rate, generator=generator)
        return mask.mul_(x).mul_(1 / (1 - self.rate))


class Layer:
    """One layer in one pass, forward or backward: what belongs to it in the compute dtype."""

    def __init__(self, static: tuple, tensors: Sequence[Tensor | None], dtype: torch.dtype):
        self.base, self.scaling = static
        self.lora_A, self.lora_B, self.bias, self.magnitude = tensors
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.A = self.lora_A.to(dtype)
        self.sB = (self.lora_B * self.scaling).to(dtype)
        self.kept: Panels | None = None

    def weight(self) -> Panels:
        """W [N, K], dense; on a GPU, where that is the whole, it is kept until the pass is over."""
        if self.kept is not None:
            return self.kept
        found = weight_panels(self.base.stored, self.dtype)
        if self.lora_A.device.type == "cpu":
            return found
        self.kept = list(found)
        return self.kept

    @cached_property
    def row_norms(self) -> Tensor:
        """||W + s B A|| by rows, fp32 or wider [N], from products of rank r."""
        A, sB = self.lora_A.to(self.wide), (self.lora_B * self.scaling).to(self.wide)
        square = (sB * (sB @ (A @ A.t()))).sum(1)
        for rows, W in self.weight():
            square[rows] += torch.linalg.vector_norm(W, dim=1, dtype=self.wide).square()
            square[rows] += 2 * (sB[rows] * F.linear(W, self.A).to(self.wide)).sum(1)  # @ [K, r]
        return square.clamp(min=0).sqrt()

    @property
    def gain(self) -> Tensor:
        return (self.magnitude.to(self.wide) / self.row_norms).to(self.dtype)

    def product(self, x: Tensor, low: Tensor) -> Tensor:
        """x W^T + s low B^T: [M, N]"""
        y = product(x, self.weight())
        return y.addmm_(low.to(y.dtype), self.sB.to(y.dtype).t())

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        """y [M, N] of x [M, K] and low = d(x) A^T [M, r]."""
        y = self.product(x, low)
        if self.magnitude is not None:
            y *= self.gain
        if self.bias is not None:
            y += self.bias
        return y

    def forward_by_base(self, x: Tensor, low: Tensor) -> Tensor:
        """The same; the base may have a better way than to make its whole weight dense."""
        if self.magnitude is not None or self.bias is not self.base.bias:
            return self.forward(x, low)
        y = self.base(x)
        # under autocast y is narrower than x; in place, as the base just made it
        return y.addmm_(low.to(y.dtype), self.sB.to(y.dtype).t())


class Group:
    """Layers that read the same x, in one pass."""

    def __init__(self, static: list, drop: Dropout, tensors: Sequence, dtype: torch.dtype):
        self.dtype = dtype
        parts = [tensors[i : i + TENSORS] for i in range(0, len(tensors), TENSORS)]
        self.layers = [Layer(s, part, dtype) for s, part in zip(static, parts, strict=True)]
        self.drop = drop
        self.ranks = [len(layer.A) for layer in self.layers]
        self.A = torch.cat([layer.A for layer in self.layers])  # [R, K]

    def low(self, x: Tensor) -> tuple[Tensor, ...]:
        """d(x) A^T of each layer, [M, r]."""
        return F.linear(self.drop(x), self.A).split(self.ranks, dim=1)

    def forward(self, x: Tensor, by_base: bool) -> list[Tensor]:
        """y [M, N] of each layer for x [M, K]: by calling the bases, or from the dense weights,
        which backward needs anyway.
        """
        lows = zip(self.layers, self.low(x), strict=True)
        if by_base:
            return [layer.forward_by_base(x, low) for layer, low in lows]
        return [layer.forward(x, low) for layer, low in lows]

    def take(self, grads: Sequence[Tensor]) -> None:
        """The gradients dy [M, N] of each layer, from which the others follow."""
        self.grads = grads
        self.scaled = [  # by DoRA's gain
            dy if layer.magnitude is None else dy * layer.gain
            for layer, dy in zip(self.layers, grads, strict=True)
        ]
        # s (dy B) of each layer: [M, N] @ [N, r], side by side [M, R]
        both = zip(self.layers, self.scaled, strict=True)
        self.dlow = torch.cat([dy @ layer.sB for layer, dy in both], dim=1)

    def grad_x(self) -> Tensor:
        """dx = dy W + s (dy B) A, summed over the layers: [M, K]"""
        dx = None
        for layer, dy in zip(self.layers, self.scaled, strict=True):
            dx = product_back(dy, layer.weight(), dx)
        if self.drop.rate:
            return dx.add_(self.drop(self.dlow @ self.A))
        return dx.addmm_(self.dlow, self.A)

    def forget_weights(self) -> None:
        for layer in self.layers:
            layer.kept = None

    def grad_tensors(self, x: Tensor, need: Sequence[bool]) -> list[Tensor | None]:
        """Of the small tensors of each layer, for x [M, K]."""
        found: list[Tensor | None] = [None] * len(need)
        if any(need[0::TENSORS]):
            # === dA = s (dy B)^T d(x), stacked: [R, M] @ [M, K] ===
            stacked = (self.dlow.t() @ self.drop(x)).split(self.ranks)
        lows = [None] * len(self.layers)
        if any(need[1::TENSORS] + need[3::TENSORS]):
            lows = self.low(x)
        for i, (layer, low) in enumerate(zip(self.layers, lows, strict=True)):
            at = TENSORS * i
            if need[at]:
                found[at] = stacked[i].to(layer.lora_A.dtype)
            if need[at + 1]:
                # === dB = s dy^T (d(x) A^T): [N, M] @ [M, r] ===
                found[at + 1] = (self.scaled[i].t() @ low).to(layer.lora_B.dtype) * layer.scaling
            if need[at + 2]:
                found[at + 2] = self.grads[i].sum(0).to(layer.bias.dtype)
            if need[at + 3]:
                through = (self.grads[i] * layer.product(x, low)).sum(0, dtype=layer.wide)
                found[at + 3] = (through / layer.row_norms).to(layer.magnitude.dtype)
        return found
