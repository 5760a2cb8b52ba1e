"""Modules that are built or used in unusual ways: layers in two places, weights that others read,
several adapters over each other, contexts inside contexts.
"""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters import merge as merging
from lorakit.adapters.layers.lora import lora_layers
from lorakit.adapters.manage import selected_adapter

# fp32 sums of up to 32 products in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def filled(module):
    """`module`, each trained value moved by noise, so that adapters change what is computed."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def chain(**options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    return filled(lk.attach(module, lk.LoraConfig(r=2, **options)))


# ---- where a layer lies ----


@pytest.mark.parametrize("place", ["0", "2"])
def test_a_layer_in_two_places_is_adapted_in_both(place):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    module = nn.Sequential(layer, nn.ReLU(), layer)
    filled(lk.attach(module, lk.LoraConfig(r=2, target_modules=[place])))
    assert module[0] is module[2]
    W = layer.weight + 4 * module[0].lora_B @ module[0].lora_A  # lora_alpha 8 over r 2
    x = torch.randn(3, 8)
    truth = torch.relu(x @ W.t() + layer.bias) @ W.t() + layer.bias
    torch.testing.assert_close(module(x), truth, **CLOSE)
    lk.detach(module)
    assert module[0] is layer
    assert module[2] is layer


def test_modules_that_are_trained_whole_do_not_lie_in_each_other():
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    config = lk.LoraConfig(target_modules=["0"], modules_to_save=["1", "1.0"])
    with pytest.raises(lk.LorakitError, match=r"1\.0 lies in another one that is named"):
        lk.attach(module, config)
    assert not lk.adapter_names(module)


def test_what_holds_another_adapter_is_not_copied():
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    lk.attach(module, lk.LoraConfig(target_modules=["1.0"]), name="a")
    config = lk.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    with pytest.raises(lk.LorakitError, match="1 holds layers of another adapter; detach that"):
        lk.attach(module, config, name="b")
    assert lk.adapter_names(module) == ["a"]


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


# ---- what a layer shows ----


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_layer_shows_the_weight_that_it_computes_with(options):
    module = chain(**options)
    layer, x = module[0], torch.randn(5, 8)
    truth = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), truth, **CLOSE)
    lk.merge(module)
    torch.testing.assert_close(layer(x), truth, **CLOSE)
    assert torch.equal(layer.weight, layer.merged.weight)
    with lk.disable_adapters(module):
        assert torch.equal(layer.weight, layer.original.weight)
    lk.unmerge(module)
    with lk.disable_adapters(module):
        assert torch.equal(layer.weight, layer.original.weight)


def test_a_packed_layer_shows_its_weight():
    module = lk.quantize(nn.Sequential(nn.Linear(64, 64)))
    lk.attach(module, lk.LoraConfig(r=2))
    base = module[0].base.dequantize()
    assert torch.equal(module[0].weight, base)  # B is zero
    with lk.disable_adapters(module):
        assert torch.equal(module[0].weight, base)


def test_the_fast_path_of_torch_has_the_adapter():
    """nn.TransformerEncoderLayer hands the weights of its layers to one fused function."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    before = layer(x)
    filled(lk.attach(layer, lk.LoraConfig(r=2, target_modules=["linear1", "linear2"])))
    slow = layer(x)
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, slow, **CLOSE)
    assert (fast - before).abs().max() > 0.01


def test_t5_reads_the_dtype_of_its_weights():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip
    ids = torch.arange(6)[None]
    before = model(input_ids=ids, labels=ids).logits
    filled(lk.attach(model, lk.LoraConfig(r=2, target_modules=["wi", "wo"])))
    adapted = model(input_ids=ids, labels=ids).logits
    assert (adapted - before).abs().max() > 0.01
    lk.merge(model)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).logits, adapted, **CLOSE)


def test_few_rows_of_a_wide_type_are_as_exact_as_many():
    """The way that calls of a few numbers take must not round an fp64 layer to A's fp32."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8)).double()
    layer = filled(lk.attach(module, lk.LoraConfig(r=2)))[0]
    x = torch.randn(3, 8, dtype=torch.float64)
    truth = x @ (layer.original.weight + 4 * layer.lora_B.double() @ layer.lora_A.double()).t()
    found = layer(x)
    assert found.dtype == torch.float64
    # sums of 8 fp64 products; in fp32 they would be 1e-8 apart
    assert (found - truth - layer.original.bias).abs().max() < 1e-13


# ---- merging ----


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


# ---- adapters by row ----


def test_rows_inside_rows():
    module = chain()
    x = torch.randn(2, 8)
    with lk.adapter_rows(module, ["default", None]):
        outer = module(x)
        with lk.adapter_rows(module, [None, "default"]):
            inner = module(x)
        assert torch.equal(module(x), outer)
    with lk.disable_adapters(module):
        base = module(x)
    # one row alone or beside another: the same products in another order
    torch.testing.assert_close(outer, torch.stack([module(x)[0], base[1]]), **CLOSE)
    torch.testing.assert_close(inner, torch.stack([base[0], module(x)[1]]), **CLOSE)


def test_rows_of_what_is_called_by_keywords():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(input=self.a(x))

    module = Named()
    config = lk.LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"])
    lk.attach(module, config)
    x = torch.randn(2, 4)
    module(x)
    with (
        lk.adapter_rows(module, ["default", None]),
        pytest.raises(lk.LorakitError, match="a Linear is called with keywords alone"),
    ):
        module(x)


def test_what_is_frozen_stays_frozen_when_another_adapter_is_deleted():
    module = chain()
    lk.attach(module, lk.LoraConfig(r=2), name="b")
    lk.set_adapter(module, "default").requires_grad_(False)
    lk.delete_adapter(module, "b")
    assert not any(p.requires_grad for p in module.parameters())
    assert selected_adapter(module) == "default"
