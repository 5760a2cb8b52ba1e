"""What is planned before the model changes."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters.layers.lora import LoraLinear
from lorakit.adapters.layers.whole_modules import SavedModule
from lorakit.adapters.methods.lora import Lora
from lorakit.adapters.plan import Plan
from lorakit.config import adapters as config_room
from tests.adapters.parity import assert_same, disturb, trained


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("how", ["detach", "delete", "merge_and_unload", "unmerge"])
def test_a_module_in_two_places_gets_one_wrapper(how):
    torch.manual_seed(0)
    module, x = Twice(), torch.randn(3, 6)
    layer, plain = module.first, module(x)
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["first", "second"]))
    assert module.first is module.second
    assert len(trained(module)) == 2
    disturb(trained(module))
    adapted = module(x)
    if how == "unmerge":
        lk.merge(module)
        assert_same(module(x), adapted)
        lk.unmerge(module)
        assert torch.equal(module(x), adapted)
        return
    if how == "merge_and_unload":
        lk.merge_and_unload(module)
        assert_same(module(x), adapted)
        assert type(module.first) is nn.Linear
        assert module.first is module.second
        return
    lk.detach(module) if how == "detach" else lk.delete_adapter(module, "default")
    assert module.first is layer
    assert module.second is layer
    assert torch.equal(module(x), plain)


def test_the_model_stays_as_it_is_until_the_plan_is_carried_out():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before, state = list(module), torch.get_rng_state()
    config = lk.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    plan = Lora().plan(module, config)
    assert [type(wrapper) for wrapper, _ in plan.parts] == [LoraLinear, SavedModule]
    assert list(plan.wrappers) == ["0", "1"]
    assert list(module) == before
    assert all(p.requires_grad for p in module.parameters())
    assert not torch.equal(torch.get_rng_state(), state)  # A is drawn with the plan
    plan.carry_out("default")
    assert [module[0], module[1]] == list(plan.wrappers.values())
    assert module[0].part_of("default") is plan.parts[0][1]


def test_a_wrapper_of_another_kind_is_refused():
    module = lk.attach(nn.Sequential(nn.Linear(4, 4)), lk.IA3Config(target_modules=["0"]))
    with pytest.raises(lk.LorakitError, match="0 is a IA3Linear of another adapter, and cannot"):
        Plan(module).wrap_linear("0", LoraLinear)


def test_a_wrapper_is_used_by_the_next_adapter():
    module = lk.attach(nn.Sequential(nn.Linear(4, 4)), lk.LoraConfig(r=2, target_modules=["0"]))
    plan = Plan(module)
    assert plan.wrap_linear("0", LoraLinear) is module[0]
    assert plan.wrap_linear("0", LoraLinear) is None  # the plan has it
    assert plan.wrapper_of("0") is module[0]


def test_the_rank_of_a_layer_is_looked_up_once(monkeypatch):
    """And its alpha: both match regexes, in each of some hundred layers."""
    asked = []
    of_pattern = config_room.of_pattern

    def counted(pattern, name, otherwise):
        asked.append((name, otherwise))
        return of_pattern(pattern, name, otherwise)

    monkeypatch.setattr(config_room, "of_pattern", counted)
    for start in (True, "pissa"):
        asked.clear()
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        options = {"target_modules": ["0", "1"], "init_lora_weights": start}
        lk.attach(module, lk.LoraConfig(r=2, lora_alpha=3, **options))
        assert sorted(asked) == [("0", 2), ("0", 3), ("1", 2), ("1", 3)]
