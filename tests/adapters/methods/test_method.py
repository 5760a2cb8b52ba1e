"""What the page on adding a method promises: one class, one entry in the list."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters.layers.base import AttachedLinear
from lorakit.adapters.layers.wrapper import Part
from lorakit.adapters.methods import known
from lorakit.adapters.methods.method import LinearMethod
from lorakit.adapters.modules_to_save import plan_modules_to_save
from lorakit.adapters.plan import Plan
from lorakit.config.adapters import TargetConfig
from tests.adapters.common import filled


@dataclass(frozen=True)
class ShiftConfig(TargetConfig):
    """An adapter that adds a trained number to each output."""

    start: float = 0.0


class ShiftPart(Part):
    def __init__(self, config: ShiftConfig, size: int):
        super().__init__(config)
        self.shift = nn.Parameter(torch.full((size,), config.start))


class ShiftLinear(AttachedLinear[ShiftPart]):
    def trained_tensors(self, name):
        return {"shift": self.part_of(name).shift}

    def compute(self, part, x):
        return self.base(x) + part.shift

    def make_merged(self, weight):
        weight = self.base.dequantize() if weight is None else weight
        return self.make_plain(weight, self.base.bias + self.part.shift)


class Shift(LinearMethod[ShiftConfig]):
    peft_type = "SHIFT"
    config_type = ShiftConfig

    def plan(self, model, config):
        plan = Plan(model)
        for name in plan.select_linear(config):
            layer = plan.wrap_linear(name, ShiftLinear)
            if layer is not None:
                plan.add(layer, ShiftPart(config, layer.out_features))
        plan_modules_to_save(plan, config)
        return plan


def fresh():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))


def test_a_new_method_is_attached_merged_saved_and_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(known, "METHODS", (*known.METHODS, Shift()))
    module, x = fresh(), torch.randn(2, 4)
    before = module(x)
    filled(lk.attach(module, ShiftConfig(target_modules=["0"], modules_to_save=["1"])))
    adapted = module(x)
    assert not torch.equal(adapted, before)
    lk.save_adapter(module, tmp_path)
    assert torch.equal(lk.load_adapter(fresh(), tmp_path)(x), adapted)
    lk.merge(module)
    # one more rounding of fp32 in each bias
    torch.testing.assert_close(module(x), adapted, rtol=1e-6, atol=1e-6)
    lk.detach(module)
    assert torch.equal(module(x), before)


def test_without_the_entry_its_config_is_refused():
    with pytest.raises(lk.LorakitError, match="ShiftConfig is not the config of a lorakit adapter"):
        lk.attach(fresh(), ShiftConfig(target_modules=["0"]))


def test_a_method_that_plans_nothing_cannot_be_made():
    class Unfinished(LinearMethod[ShiftConfig]):
        peft_type = "UNFINISHED"
        config_type = ShiftConfig

    with pytest.raises(TypeError, match="plan"):
        Unfinished()
