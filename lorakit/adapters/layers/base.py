"""The linear layers that adapters sit on, and what all adapters of linear layers share.

A wrapper of a linear layer asks little of its base: `base(x)`, `base.dequantize()`, `base.stored`
(the weight as the kernels take it), `base.requantize(w)` and `base.frozen`. What the base stores,
four bits or thirty-two, is its own business. Packed layers (models/packed_layers.py) have these
methods themselves. Dense layers get them here:

    DenseBase               an nn.Linear, W [out, in]
    TransposedBase          a layer that stores W^T [in, out], such as the Conv1D of transformers
    CalledBase              an nn.Linear that is more than its weight and bias
    CalledTransposedBase    a Conv1D that is more than its weight and bias
"""

import copy
from typing import Protocol, TypeVar, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.adapters.layers.wrapper import Attached, PartT
from lorakit.kernels import Packed
from lorakit.models.hooks import has_hooks, has_own_forward
from lorakit.models.shards import keep, whole


@runtime_checkable
class LinearBase(Protocol):
    """A linear layer that an adapter can sit on: a module that has these members too."""

    in_features: int
    out_features: int

    @property
    def bias(self) -> Tensor | None:
        """The bias [out], if there is one."""

    @property
    def frozen(self) -> bool:
        """Whether the weight is frozen and the fused kernels may compute the layer."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor: ...

    def dequantize(self) -> Tensor:
        """Return the weight [out, in], dense, without gradients."""

    @property
    def stored(self) -> Tensor | Packed:
        """The weight [out, in] as the kernels take it."""

    def requantize(self, w: Tensor) -> None:
        """Store another weight [out, in] in the same format."""


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
        return whole(self.linear.weight).detach()

    @property
    def stored(self) -> Tensor:
        return self.linear.weight.detach()

    def requantize(self, w: Tensor) -> None:
        keep(self.linear.weight, w)


class CalledBase(DenseBase):
    """An nn.Linear that is more than its weight and bias, so it is called as it is.

    It has hooks, a forward of its own, or a weight that is computed, as pruned layers have.
    """

    @property
    def frozen(self) -> bool:
        """False: the fused kernels would not call the layer."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def must_be_called(layer: nn.Module) -> bool:
    """Return whether a linear layer is more than its weight and bias; see `CalledBase`."""
    return has_hooks(layer) or has_own_forward(layer) or "weight" not in layer._parameters


class TransposedBase(DenseBase):
    """A linear layer that stores its weight [in, out], such as the Conv1D of transformers."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.in_features, self.out_features = linear.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight.t(), self.linear.bias)

    def dequantize(self) -> Tensor:
        return whole(self.linear.weight).detach().t()

    @property
    def stored(self) -> Tensor:
        return self.linear.weight.detach().t()

    def requantize(self, w: Tensor) -> None:
        keep(self.linear.weight, w.t())


class CalledTransposedBase(CalledBase, TransposedBase):
    """A Conv1D that is more than its weight and bias."""


class AttachedLinear(Attached[PartT]):
    """The base class of all wrappers of a linear layer."""

    base: LinearBase  # type: ignore[assignment]  # and a module, which a Protocol cannot say

    def __init__(self, base: LinearBase):
        assert isinstance(base, nn.Module)
        super().__init__(base)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def original(self) -> nn.Module:
        base = self.base
        if isinstance(base, DenseBase):
            return base.linear
        assert isinstance(base, nn.Module)
        return base

    @property
    def weight(self) -> Tensor:
        """The weight that the layer multiplies with, the adapter's part included.

        It is laid out as the original stores it, and computed each time, without gradients. It is
        for code that reads a layer's weight, as torch's encoder layers and T5 do.
        """
        layer = self._as_one_module()
        weight = layer.dequantize() if isinstance(layer, LinearBase) else layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias [out] that the layer adds, the adapter's part included."""
        bias = self._as_one_module().bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def _as_one_module(self) -> nn.Module:
        """Return one module that computes as the wrapper does, merged for that if need be."""
        return self.current_module() if self.active is None else self.make_merged(None)

    def make_plain(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Return a layer like the original with another weight [out, in] and bias [out]."""
        if isinstance(self.base, TransposedBase):
            weight = weight.t().contiguous()
        if isinstance(self.base, DenseBase) and "weight" in self.base.linear._parameters:
            return with_weight(self.base.linear, weight, bias)
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        return with_weight(linear, weight, bias)


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def with_weight(layer: ModuleT, weight: Tensor, bias: Tensor | None = None) -> ModuleT:
    """Return a copy of `layer` with another frozen weight and bias; they share the rest."""
    other = copy.copy(layer)
    other._parameters = dict(layer._parameters)
    other.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        other.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return other
