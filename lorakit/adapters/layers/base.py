"""Carried out of lorakit/lora.py."""

import copy
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.adapters.layers.wrapper import Attached
from lorakit.kernels import Packed
from lorakit.models.hooks import has_hooks, has_own_forward


@runtime_checkable
class Base(Protocol):
    """What an adapter can sit on: a module with these beside its forward."""

    in_features: int
    out_features: int
    bias: Tensor | None
    frozen: bool

    def dequantize(self) -> Tensor: ...

    @property
    def stored(self) -> Tensor | Packed: ...

    def requantize(self, w: Tensor) -> None: ...


class DenseBase(nn.Module):
    """An nn.Linear with the methods of a base."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.training = linear, linear.training
        self.out_features, self.in_features = linear.weight.shape

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    @property
    def frozen(self) -> bool:
        return not self.linear.weight.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        linear = self.linear
        return F.linear(x, linear.weight, linear.bias)

    def dequantize(self) -> Tensor:
        return self.linear.weight.detach()

    @property
    def stored(self) -> Tensor:
        return self.linear.weight.detach()

    def requantize(self, w: Tensor) -> None:
        self.linear.weight.data.copy_(w)


class CalledBase(DenseBase):
    """An nn.Linear that is more than its weight and bias: with hooks, a forward of its own, or a
    weight that is computed, as pruned ones have it. It is called as it is.
    """

    @property
    def frozen(self) -> bool:
        """The fused kernels would not call it."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def must_be_called(layer: nn.Module) -> bool:
    """Return whether a linear layer is more than its weight and bias: see `CalledBase`."""
    return has_hooks(layer) or has_own_forward(layer) or "weight" not in layer._parameters


class TransposedBase(DenseBase):
    """A linear layer that stores its weight [in, out], such as the Conv1D of transformers."""

    def __init__(self, linear: nn.Module):
        super().__init__(linear)
        self.in_features, self.out_features = linear.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight.t(), self.linear.bias)

    def dequantize(self) -> Tensor:
        return self.linear.weight.detach().t()

    @property
    def stored(self) -> Tensor:
        return self.linear.weight.detach().t()

    def requantize(self, w: Tensor) -> None:
        self.linear.weight.data.copy_(w.t())


class CalledTransposedBase(CalledBase, TransposedBase):
    """A Conv1D that is more than its weight and bias."""


class AttachedLinear(Attached):
    """The common part of all kinds on a linear layer."""

    def __init__(self, base: Base):
        super().__init__(base)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def plain(self) -> nn.Module:
        return self.base.linear if isinstance(self.base, DenseBase) else self.base

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with, adapter and all, [out, in], computed each time and
        without gradients: for code that reads a layer's weight, as torch's encoder layers and T5
        do.
        """
        layer = self._whole()
        return layer.dequantize() if isinstance(layer, Base) else layer.weight

    @property
    def bias(self) -> Tensor | None:
        """What the layer adds, [out]."""
        return self._whole().bias

    def _whole(self) -> nn.Module:
        return self.current() if self.using[0] is None else self.joined(None)

    def plain_with(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A layer of its own, as the base is, with another weight [out, in]."""
        if isinstance(self.base, TransposedBase):
            weight = weight.t().contiguous()
        if isinstance(self.base, DenseBase) and "weight" in self.base.linear._parameters:
            return with_weight(self.base.linear, weight, bias)
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        return with_weight(linear, weight, bias)


def with_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A copy of `layer` with another frozen weight and bias; the rest is shared with it."""
    other = copy.copy(layer)
    other._parameters = dict(layer._parameters)
    other.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        other.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return other
