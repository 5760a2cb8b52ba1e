"""Modules that are trained as they are, beside the adapted layers.

    SavedModule     a module that is trained whole (modules_to_save)
    TrainedBias     a module whose bias alone is trained (bias="all")

Each adapter has a copy of what it trains. The module that was there stays as it was.
"""

import copy
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lorakit.adapters.layers.wrapper import Attached, PartT
from lorakit.models.shards import whole


class _Delegate(Attached[PartT]):
    """A wrapper that looks from outside like the module that computes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.current_module(), name)


class SavedModule(_Delegate[nn.Module]):
    """A module trained whole: each adapter has a copy of it as its part."""

    def current_module(self) -> nn.Module:
        return super().current_module() if self.active is None else self.active

    def only_module(self) -> nn.Module | None:
        return super().only_module() if self.active is None else self.active

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        return dict(self.part_of(name).named_parameters())

    def loadable_tensors(self, name: str) -> dict[str, Tensor]:
        return self.part_of(name).state_dict(keep_vars=True)

    def tensors_to_save(self, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for ending, tensor in self.loadable_tensors(name).items():
            # A file holds no tensor under two names.
            twice = any(tensor is other for other in found.values())
            found[ending] = tensor.detach().clone() if twice else tensor
        return found

    def compute(self, part: nn.Module, *args: Any, **options: Any) -> Any:
        return part(*args, **options)

    def make_merged(self, weight: Tensor | None) -> nn.Module:
        return copy.deepcopy(self.part).requires_grad_(False)


class BiasPart(nn.Module):
    """A bias of one adapter, of the shape and type that the module's own has."""

    def __init__(self, bias: Tensor):
        super().__init__()
        self.bias = nn.Parameter(whole(bias).detach().clone())


class TrainedBias(_Delegate[BiasPart]):
    """A module whose bias alone is trained: each adapter has its own."""

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {"bias": self.part_of(name).bias}

    def compute(self, part: BiasPart, *args: Any, **options: Any) -> Any:
        return functional_call(self.base, {"bias": part.bias}, args, options)

    def make_merged(self, weight: Tensor | None) -> nn.Module:
        other, own = copy.copy(self.base), self.base.bias
        assert isinstance(own, Tensor)
        other._parameters = dict(self.base._parameters)
        bias = self.part.bias.detach().to(own.dtype, copy=True)
        other.bias = nn.Parameter(bias, requires_grad=False)
        return other
