"""IA3 (arXiv:2205.05638): one trained factor for each output of a layer, or each input.

    y = l * (W x + b)        l [out]
    y = W (l * x) + b        l [in], for `feedforward_modules`: the layer that ends an MLP, whose
                             input is the hidden state

Both are a row or a column of W times a number, so merged nothing is left of it. What is trained and
stored are in or out numbers a layer, a hundredth of LoRA's of rank 8; it starts from ones, where
nothing is changed. In exchange it cannot turn a direction into another one, as LoRA can.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.base import AttachedLinear
from lorakit.adapters.layers.wrapper import Part
from lorakit.adapters.plan import Plan, base_of, device_of, linear_places, save_whole
from lorakit.adapters.targets import match_targets
from lorakit.config.adapters import TargetConfig


@dataclass(frozen=True)
class IA3Config(TargetConfig):
    """An adapter of factors."""

    feedforward_modules: str | list[str] | None = None
    """of the adapted layers those whose input is scaled; by the rules of target_modules"""


class IA3Part(Part):
    """Of one layer: ia3_l fp32 [out, 1], or [1, in] if it scales the input."""

    def __init__(self, config: IA3Config, size: int, feedforward: bool):
        super().__init__(config)
        self.feedforward = feedforward
        self.ia3_l = nn.Parameter(torch.ones((1, size) if feedforward else (size, 1)))


class IA3Linear(AttachedLinear[IA3Part]):
    """base(x) * l, or base(x * l)."""

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


def plan_ia3(module: nn.Module, config: IA3Config) -> Plan:
    plan, chosen = Plan(), dict(linear_places(module, config))
    inner = config.feedforward_modules
    fed = set(match_targets(list(chosen), inner, "feedforward_modules") if inner else ())
    for place, layer in chosen.items():
        each = plan.wrap(place, layer, IA3Linear, lambda layer=layer: IA3Linear(base_of(layer)))
        if each is not None:
            size = each.in_features if place in fed else each.out_features
            part = IA3Part(config, size, place in fed).to(device_of(each.base))
            plan.parts.append((each, part))
    return save_whole(plan, module, config)
