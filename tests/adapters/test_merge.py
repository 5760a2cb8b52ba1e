"""Merging: what it computes, saves and measures, and what it refuses."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters import merge as merging
from lorakit.adapters.layers.lora import lora_layers
from tests.adapters.common import CONFIG, IDS, chain, randomize


def test_merge_and_unmerge(either):
    base_bits = [p.clone() for p in either.parameters()]
    base = either(IDS)
    randomize(lk.attach(either, CONFIG))
    adapted = either(IDS)
    assert (adapted - base).abs().max() > 0.1
    lk.merge(either)
    # one fp32 rounding per weight instead of two products
    assert (either(IDS) - adapted).abs().max() < 1e-4 * adapted.abs().max()
    lk.unmerge(either)
    assert torch.equal(either(IDS), adapted)
    lk.detach(either)
    assert torch.equal(either(IDS), base)
    for a, b in zip(either.parameters(), base_bits, strict=True):
        assert torch.equal(a, b)


def test_merged_model_is_saved_as_it_computes(either, tmp_path):
    lk.merge(randomize(lk.attach(either, CONFIG)))
    lk.save_model(either, tmp_path)
    assert torch.equal(lk.load_model(tmp_path, dtype="float32")(IDS), either(IDS))


def test_merged_directory_loads_in_transformers(either, tmp_path):
    from transformers import AutoModelForCausalLM

    lk.merge(randomize(lk.attach(either, CONFIG)))
    lk.save_model(either, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    # the same weights, as fp32; transformers' sums differ in order
    difference = (theirs(IDS).logits - either(IDS)).abs().max()
    assert difference <= 1e-5 * either(IDS).abs().max()


def test_an_unmerged_adapter_is_not_saved_silently(model, tmp_path):
    lk.attach(model, CONFIG)
    with pytest.raises(lk.LorakitError, match="merge it into the weights, or detach it"):
        lk.save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_merge_refuses_what_is_not_finite(model):
    randomize(lk.attach(model, CONFIG))
    last = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        last.lora_B[0, 0] = float("inf")
    with pytest.raises(lk.LorakitError, match=r"down_proj holds NaN or infinite"):
        lk.merge(model)
    assert all(layer.merged is None for layer in lora_layers(model).values())


@pytest.mark.parametrize("context", [lk.disable_adapters, lambda m: lk.adapter_rows(m, [None])])
@pytest.mark.parametrize("action", [lk.merge, lk.merge_and_unload])
def test_what_is_switched_off_is_not_merged(context, action):
    module = chain()
    x = torch.ones(1, 8)
    before = module(x)
    with (
        context(module),
        pytest.raises(lk.LorakitError, match="disabled, or differ by row; leave that block"),
    ):
        action(module)
    assert torch.equal(module(x), before)


def test_an_interrupted_merge_leaves_nothing_merged(monkeypatch):
    module = chain()
    x = torch.ones(1, 8)
    before = module(x)
    make_merged = type(module[0]).make_merged

    def interrupted(layer, weight):
        if layer is module[2]:
            raise KeyboardInterrupt
        return make_merged(layer, weight)

    monkeypatch.setattr(type(module[0]), "make_merged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lk.merge(module)
    assert all(layer.merged is None for layer in lora_layers(module).values())
    assert torch.equal(module(x), before)


def test_measuring_the_drift_leaves_the_mode_of_every_module(tiny_dir):
    model = lk.attach(lk.load_model(tiny_dir, dtype="float32", quantize="nf4"))
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert lk.merge(model) is not None
    lk.unmerge(model)
    assert [module.training for module in model.modules()] == before
    assert not all(before)


def test_a_model_that_fails_while_the_drift_is_measured_is_not_merged(monkeypatch, tiny_dir):
    model = lk.attach(lk.load_model(tiny_dir, dtype="float32", quantize="nf4")).train()
    calls = []

    def failing(module, ids):
        calls.append(ids)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return torch.zeros(1, 1)

    monkeypatch.setattr(merging, "_logits", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        lk.merge(model)
    assert all(layer.merged is None for layer in lora_layers(model).values())


def test_a_merge_is_not_taken_back_by_a_forward_of_its_own():
    """accelerate puts such a forward on every layer that it moves."""
    for module, options in (
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"target_modules": ["0"]}),
        (nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)), {"target_modules": ["0"]}),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"target_modules": ["1"], "bias": "all"}),
    ):
        forward = module[0].forward
        module[0].forward = forward
        lk.attach(module, lk.LoraConfig(r=2, **options))
        with pytest.raises(lk.LorakitError, match="merge: 0 has a forward of its own"):
            lk.merge(module)
