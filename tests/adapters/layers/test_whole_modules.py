"""Modules that are trained whole, and biases that are trained alone."""

import copy

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from tests.adapters.common import CLOSE, chain, filled


class Twice(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.l, self.l2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.l2.weight = self.l.weight

    def forward(self, x):
        return self.l2(self.l(x))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), Twice()

    def forward(self, x):
        return self.head(self.bn(self.a(x)))


def trained(model, x):
    model.train()
    for _ in range(20):
        model(x)
    return model.eval()


def test_a_saved_module_has_its_buffers_and_all_its_names(tmp_path):
    torch.manual_seed(0)
    plain, x = Normed(), torch.randn(16, 8)
    options = {"r": 2, "target_modules": ["a"], "modules_to_save": ["bn", "head"]}
    ours = filled(lk.attach(copy.deepcopy(plain), lk.LoraConfig(**options)))
    theirs = filled(peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options)))
    lk.save_adapter(trained(ours, x), tmp_path / "ours")
    trained(theirs, x).save_pretrained(tmp_path / "theirs")
    for folder, truth in (("ours", ours), ("theirs", theirs)):
        mine = lk.load_adapter(copy.deepcopy(plain), tmp_path / folder).eval()
        torch.testing.assert_close(mine(x), truth(x), **CLOSE)
        other = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / folder).eval()
        torch.testing.assert_close(other(x), truth(x), **CLOSE)
    ours.bn.running_var[0] = float("nan")
    with pytest.raises(lk.LorakitError, match="the merged weight of bn holds NaN"):
        lk.merge(ours)


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))
        self.proj = nn.Linear(8, 8) if inner else None

    def forward(self, x):
        return (x if self.proj is None else self.proj(x)) + self.bias


def test_biases_that_belong_to_no_weight(tmp_path):
    module = nn.ModuleDict({"out": nn.Linear(8, 3), "blk": Block(True)})
    with pytest.raises(lk.LorakitError, match="blk has a bias of its own beside the modules in it"):
        lk.attach(module, lk.LoraConfig(target_modules=["proj"], bias="all"))
    plain = nn.Sequential(nn.Linear(8, 8), Block(False))
    ours = filled(lk.attach(copy.deepcopy(plain), lk.LoraConfig(target_modules=["0"], bias="all")))
    lk.save_adapter(ours, tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(lk.load_adapter(plain, tmp_path)(x), ours(x), **CLOSE)
    truth = ours(x)
    torch.testing.assert_close(lk.merge_and_unload(ours)(x), truth, **CLOSE)


def test_all_biases_of_a_second_adapter(tmp_path):
    """The LayerNorm has a wrapper already; a linear layer of the first adapter cannot be one."""
    config = lk.LoraConfig(r=2, bias="all")
    module = chain(bias="all")
    first = module(torch.ones(1, 8))
    filled(lk.attach(module, config, name="b"))
    second = module(torch.ones(1, 8))
    assert not torch.allclose(first, second)
    lk.save_adapter(module, tmp_path)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    assert torch.equal(lk.load_adapter(plain, tmp_path)(torch.ones(1, 8)), second)
    module = chain()
    with pytest.raises(lk.LorakitError, match="0 is a LoraLinear of another adapter"):
        lk.attach(module, lk.LoraConfig(target_modules=["2"], bias="all"), name="b")
    assert lk.adapter_names(module) == ["default"]
