"""IA3 (arXiv:2205.05638): one trained factor for each output of a layer, or each input.

    y = l * (W x + b)        l [out]
    y = W (l * x) + b        l [in], for `feedforward_modules`: the layer that ends an MLP, whose
                             input is the hidden state

Both multiply the rows or the columns of W by numbers, so a merged layer costs nothing more than W.
A layer trains and stores `in` or `out` numbers, a hundredth of what LoRA of rank 8 does. The
factors start as ones, which change nothing. In exchange IA3 cannot turn one direction into another,
as LoRA can.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.base import AttachedLinear
from lorakit.adapters.layers.wrapper import Part
from lorakit.adapters.methods.method import LinearMethod, linear_parts
from lorakit.adapters.modules_to_save import plan_modules_to_save
from lorakit.adapters.plan import Plan
from lorakit.adapters.targets import match_targets, targets_for
from lorakit.config.adapters import TargetConfig


@dataclass(frozen=True)
class IA3Config(TargetConfig):
    """An adapter that trains one factor for each output of a layer, or each input (IA3)."""

    feedforward_modules: str | list[str] | None = None
    """The adapted layers whose inputs are scaled, by the rules of target_modules."""


class IA3Part(Part):
    """The factors of one layer: ia3_l, fp32 [out, 1], or [1, in] if it scales the input."""

    def __init__(self, config: IA3Config, size: int, feedforward: bool):
        super().__init__(config)
        self.feedforward = feedforward
        self.ia3_l = nn.Parameter(torch.ones((1, size) if feedforward else (size, 1)))


class IA3Linear(AttachedLinear[IA3Part]):
    """A linear layer with factors: base(x) * l, or base(x * l)."""

    def trained_tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {"ia3_l": self.part_of(name).ia3_l}

    def compute(self, part: IA3Part, x: Tensor) -> Tensor:
        factor = part.ia3_l.flatten()
        if part.feedforward:
            return self.base((x * factor).to(x.dtype))
        y = self.base(x)
        return (y * factor).to(y.dtype)

    @torch.no_grad()
    def make_merged(self, weight: Tensor | None) -> nn.Module:
        part, own, bias = self.part, self.base.dequantize(), self.base.bias
        found = (own if weight is None else weight) * part.ia3_l
        if bias is not None and not part.feedforward:
            bias = (bias * part.ia3_l.flatten()).to(bias.dtype)
        return self.make_plain(found.to(own.dtype), bias)


class IA3(LinearMethod[IA3Config]):
    """The method that trains one factor for each output of a layer, or each input."""

    peft_type = "IA3"
    config_type = IA3Config
    names_of_layers = ("target_modules", "feedforward_modules")

    def plan(self, model: nn.Module, config: IA3Config) -> Plan:
        """Plan a factor for every selected layer."""
        plan = Plan(model)
        chosen, inner = plan.select_linear(config), config.feedforward_modules
        fed = match_targets(chosen, inner, "feedforward_modules") if inner else []
        for name in chosen:
            layer = plan.wrap_linear(name, IA3Linear)
            if layer is not None:
                feedforward = name in fed
                size = layer.in_features if feedforward else layer.out_features
                part = IA3Part(config, size, feedforward)
                plan.add(layer, part.to(layer.device))
        plan_modules_to_save(plan, config)
        return plan

    def config_values(self, model: nn.Module, name: str, config: IA3Config) -> dict[str, Any]:
        """Return every field, with short names of the layers.

        PEFT wants each entry of feedforward_modules among target_modules too.
        """
        values, parts = super().config_values(model, name, config), linear_parts(model, name)
        fed = targets_for([place for place, part in parts.items() if part.feedforward], model)
        rest = targets_for([place for place, part in parts.items() if not part.feedforward], model)
        if isinstance(fed, list) and isinstance(rest, list):
            values["target_modules"] = [*rest, *fed]
        return values | {"feedforward_modules": fed}
