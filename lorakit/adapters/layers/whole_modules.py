"""Modules that are trained as they are, beside the adapted layers.

    SavedModule     a module that is trained whole (modules_to_save)
    TrainedBias     a module of which the bias is trained (bias="all")

Each adapter has a copy of what it trains; the module that was there stays as it was.
"""

import copy

from torch import Tensor, nn
from torch.func import functional_call

from lorakit.adapters.layers.wrapper import Attached


class Delegate(Attached):
    """Looks from outside like the module that computes."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.current(), name)


class SavedModule(Delegate):
    """A module trained whole: each adapter has a copy of it."""

    def current(self) -> nn.Module:
        (copied,) = self.using
        return super().current() if copied is None else copied

    def alone(self) -> nn.Module | None:
        return super().alone() if self.using[0] is None else self.current()

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        return dict(self.adapters[name].named_parameters())

    def stored(self, name: str) -> dict[str, Tensor]:
        return self.adapters[name].state_dict(keep_vars=True)

    def saved(self, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for ending, tensor in self.stored(name).items():  # a file holds no tensor under two names
            twice = any(tensor is other for other in found.values())
            found[ending] = tensor.detach().clone() if twice else tensor
        return found

    def compute(self, copied: nn.Module, *args, **options):
        return copied(*args, **options)

    def joined(self, weight: Tensor | None) -> nn.Module:
        return copy.deepcopy(self.adapters[self.selected]).requires_grad_(False)


class BiasPart(nn.Module):
    def __init__(self, bias: Tensor):
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())


class TrainedBias(Delegate):
    """A module whose bias alone is trained: each adapter has its own."""

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {"bias": self.adapters[name].bias}

    def compute(self, part: BiasPart, *args, **options):
        return functional_call(self.base, {"bias": part.bias}, args, options)

    def joined(self, weight: Tensor | None) -> nn.Module:
        other, bias = copy.copy(self.base), self.adapters[self.selected].bias.detach()
        other._parameters = dict(self.base._parameters)
        other.bias = nn.Parameter(bias.to(self.base.bias.dtype, copy=True), requires_grad=False)
        return other
