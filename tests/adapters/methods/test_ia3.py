"""IA3: factors of outputs and of inputs."""

import json

import torch

import lorakit as lk
from tests.adapters.methods.common import shaken
from tests.adapters.parity import assert_same, logits_of, peft_load


def test_biases_merge_too():
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5))
    config = lk.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"])
    x = torch.randn(3, 6)
    shaken(lk.attach(linear, config))
    adapted = linear(x)
    lk.merge(linear)
    assert (linear(x) - adapted).abs().max() < 1e-6  # fp32 sums of 8 terms


def test_factors_start_as_ones_and_change_nothing(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5))
    x = torch.randn(3, 6)
    before = module(x)
    lk.attach(module, lk.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    assert torch.equal(module(x), before)
    assert module[0].part.ia3_l.shape == (8, 1)  # its outputs
    assert module[1].part.ia3_l.shape == (1, 8)  # its inputs
    assert module[0].part.ia3_l.eq(1).all()
    lk.save_adapter(module, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["feedforward_modules"] == ["1"]


def test_some_of_the_layers_of_one_name_are_fed(bases, tmp_path):
    """PEFT refuses an entry of feedforward_modules that is not among target_modules too."""
    _, theirs, ours = bases("llama")
    fed = ["layers.0.mlp.down_proj"]
    config = lk.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=fed)
    shaken(lk.attach(ours, config))
    lk.save_adapter(ours, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["feedforward_modules"] == ["model.layers.0.mlp.down_proj"]
    assert "q_proj" in written["target_modules"]
    assert_same(logits_of(peft_load(theirs, tmp_path)), logits_of(ours))
