"""Modules that are trained as they are, beside the adapted layers.

    SavedModule     a module that is trained whole (modules_to_save)
    TrainedBias     a module of which the bias is trained (bias="all")

Each adapter has a copy of what it trains; the module that was there stays as it was.
"""

import copy

from torch import Tensor, nn
from torch.func import functional_call

from .attached import Attached
from .lora import with_weight


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
        bias = self.adapters[self.selected].bias.detach().to(self.base.bias.dtype)
        return with_weight(self.base, self.base.weight.detach(), bias)
