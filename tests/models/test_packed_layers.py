"""Packed layers: their product, their parameters, their moves; and the walk that places them."""

import copy
import math

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit import kernels
from lorakit.kernels.ops.cross_entropy import linear
from lorakit.kernels.ops.frozen_linear import dense as dense_weights
from lorakit.models.packed_layers import (
    Int8Embedding,
    Int8Linear,
    NF4Embedding,
    NF4Linear,
    packed_layer,
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.ModuleDict({"lm_head": nn.Linear(24, 8)}))


def test_replaces_linear_layers_but_not_the_head():
    module = lk.quantize(net())
    assert isinstance(module[0], NF4Linear)
    assert type(module[2]["lm_head"]) is nn.Linear
    everything = lk.quantize(net(), lk.QuantConfig(lm_head="int8"))
    assert isinstance(everything[0], NF4Linear)
    assert isinstance(everything[2]["lm_head"], Int8Linear)


@pytest.mark.parametrize(
    ("config", "low", "high", "stored"),
    [
        # relative errors of uniform values; int8 rounds to 1/127 of the largest
        (lk.QuantConfig(), 0.05, 0.12, 40 * 24 // 2),
        (lk.QuantConfig(double_quant=False), 0.05, 0.12, 40 * 24 // 2),
        (lk.QuantConfig(search_scales=True), 0.05, 0.10, 40 * 24 // 2),
        (lk.QuantConfig("fp4"), 0.05, 0.16, 40 * 24 // 2),
        (lk.QuantConfig("int8"), 0.001, 0.006, 40 * 24),
    ],
)
def test_computes_with_the_dequantized_weight(config, low, high, stored):
    module = net()[0]
    bias = module.bias
    layer = packed_layer(module, config)
    x, dense = torch.randn(3, 40), layer.dequantize()
    exact = nn.functional.linear(x.double(), dense.double(), bias.double())
    # sums of 40 products in any order: each rounds to 2^-24 of the magnitudes
    allowed = 41 * 2**-24 * nn.functional.linear(x.abs(), dense.abs(), bias.abs())
    assert ((layer(x) - exact).abs() <= allowed).all()
    error = (layer.dequantize() - module.weight).norm() / module.weight.norm()
    assert low < error < high
    assert all(not p.requires_grad for n, p in layer.named_parameters() if n != "bias")
    assert layer.weight.nbytes == stored


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("width", [64, 40])
def test_an_embedding_dequantizes_its_rows(kind, width):
    torch.manual_seed(0)
    dense = nn.Embedding(50, width)
    layer = packed_layer(dense, lk.QuantConfig(kind))
    assert isinstance(layer, Int8Embedding if kind == "int8" else NF4Embedding)
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    assert torch.equal(layer(ids), layer.dequantize()[ids])
    assert layer(ids).shape == (2, 3, width)
    assert layer.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    with pytest.raises(IndexError):
        layer(torch.tensor([50]))


def test_an_embedding_reads_only_its_rows():
    """The look-up of one row touches neither the other rows' codes nor makes them dense."""
    layer = packed_layer(nn.Embedding(1 << 15, 256), lk.QuantConfig())
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(torch.tensor([5]))
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < 100_000  # the dense matrix has 33 MB


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_packed_embeddings_and_head(tiny_model, kind, tied):
    """Forward, loss and gradient are those of a model that holds the dequantized weights."""
    model = tiny_model(tied)
    config = lk.QuantConfig(embed_tokens=kind, lm_head=None if tied else kind)
    lk.quantize(model, config)
    dense = tiny_model(tied)
    for name, layer in model.named_modules():
        if isinstance(layer, (NF4Linear, Int8Linear, NF4Embedding, Int8Embedding)):
            dense.get_submodule(name).weight.data.copy_(layer.dequantize())
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    for m in (model, dense):
        m.requires_grad_(False)
    # fp32 sums in another order: of the logits, of the loss, and of gradients through two layers
    assert torch.allclose(model(ids), dense(ids), rtol=1e-5, atol=1e-5)
    gradients = []
    for m in (model, dense):
        norm = m.model.norm.weight.requires_grad_()
        loss, count = m.loss(ids, labels)
        loss.backward()
        gradients.append((loss.detach(), norm.grad, count))
    (loss, grad, count), (expected, expected_grad, expected_count) = gradients
    assert count == expected_count == 16
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-5 * expected_grad.abs().max())
    heads = [n for n, _ in model.named_parameters() if "lm_head" in n]
    assert bool(heads) != tied  # a tied head has no tensor of its own


@pytest.fixture
def tiny_model(tiny_dir):
    def make(tied: bool):
        model = lk.load_model(tiny_dir, dtype="float32", device="cpu")
        if tied:
            model.lm_head = None
        return model

    return make


def test_generation_and_copies_of_a_model_packed_throughout(tiny_dir):
    config = {"embed_tokens": "int8", "lm_head": "nf4"}
    model = lk.load_model(tiny_dir, dtype="float32", quantize=config)
    tok = lk.load_tokenizer(tiny_dir)
    text = lk.generate(model, tok, "ab", max_new_tokens=5)
    assert lk.generate(copy.deepcopy(model), tok, "ab", max_new_tokens=5) == text
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert lk.generate(model, tok, "ab", max_new_tokens=5) == text


def test_requantize():
    layer = packed_layer(net()[0], lk.QuantConfig())
    w = torch.randn(24, 40)
    layer.requantize(w)
    again = layer.dequantize()
    layer.requantize(again)
    # the values lie on NF4's levels already; the scales are rounded to 8 bits a second time
    assert (layer.dequantize() - again).abs().max() < 0.01 * again.abs().max()
    with pytest.raises(lk.LorakitError, match=r"the weight is \(40, 24\), the layer \(24, 40\)"):
        layer.requantize(w.t())


def test_to_dtype_keeps_the_scales():
    layer = packed_layer(net()[0], lk.QuantConfig())
    exact = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.dtype == torch.bfloat16
    assert layer.nested_absmax.dtype == layer.offset.dtype == torch.float32
    assert torch.equal(layer.dequantize(), exact.bfloat16())
    assert layer(torch.randn(2, 40).bfloat16()).dtype == torch.bfloat16
    layer.to(torch.float32)
    assert torch.equal(layer.dequantize(), exact)


def test_state_dict_round_trip():
    a = packed_layer(net()[0], lk.QuantConfig())
    b = packed_layer(nn.Linear(40, 24), lk.QuantConfig())
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.dequantize(), b.dequantize())


def test_meta_shells_have_the_final_shapes():
    with torch.device("meta"):
        shell = packed_layer(nn.Linear(100, 30), lk.QuantConfig(block_size=32))
    real = packed_layer(nn.Linear(100, 30), lk.QuantConfig(block_size=32))
    for (name, a), b in zip(shell.named_parameters(), real.parameters(), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name


def test_names_in_the_config_must_mean_something(tiny_model):
    tied = tiny_model(True)
    with pytest.raises(lk.LorakitError, match="no layer lm_head .* tied to the embedding"):
        lk.quantize(tied, lk.QuantConfig(lm_head="nf4"))
    with pytest.raises(lk.LorakitError, match=r"no nn\.Embedding"):
        lk.quantize(net(), lk.QuantConfig(embed_tokens="nf4"))
    with pytest.raises(lk.LorakitError, match="lm_head is .* stands in skip_modules too"):
        lk.QuantConfig(lm_head="int8", skip_modules=["lm_head"])
    assert not any(isinstance(m, NF4Linear) for m in tied.modules())


def test_what_is_skipped_by_a_part_of_its_name(tiny_model):
    model = lk.quantize(tiny_model(False), lk.QuantConfig(skip_modules=["mlp", "layers.1"]))
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            dense = ".mlp." in name or ".layers.1." in name
            assert isinstance(layer, nn.Linear if dense else NF4Linear), name


def test_an_adapter_must_come_after(tiny_model):
    model = lk.attach(tiny_model(False))
    with pytest.raises(lk.LorakitError, match="quantize the model before attaching"):
        lk.quantize(model)


def test_the_mode_is_kept(tiny_model):
    model = lk.quantize(tiny_model(False))
    assert not any(module.training for module in model.modules())
    assert lk.quantize(net().train())[0].training


def test_a_model_in_double(tiny_model):
    model = lk.quantize(tiny_model(False), lk.QuantConfig(embed_tokens="nf4", lm_head="int8"))
    ids = torch.arange(6)[None]
    expected = model(ids)
    # fp32 roundings of the first run; the weights are the same
    assert torch.allclose(model.double()(ids).float(), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_in_two_places_is_refused():
    layer = nn.Linear(8, 8)
    with pytest.raises(lk.LorakitError, match="0 shares its weight with another layer"):
        lk.quantize(nn.Sequential(layer, nn.ReLU(), layer))


def test_a_weight_of_two_layers_is_refused():
    module = nn.ModuleDict({"embed": nn.Embedding(10, 8), "lm_head": nn.Linear(8, 10, bias=False)})
    module["lm_head"].weight = module["embed"].weight
    with pytest.raises(lk.LorakitError, match="embed shares its weight with another layer"):
        lk.quantize(module, lk.QuantConfig(embed_tokens="nf4"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(bad):
    module = net()
    module.append(nn.Linear(8, 8))
    with torch.no_grad():
        module[3].weight[2, 3] = bad
    with pytest.raises(lk.LorakitError, match="quantize: 3 holds NaN or infinite values"):
        lk.quantize(module)
    assert type(module[0]) is nn.Linear


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_linear_cross_entropy_with_a_packed_head(monkeypatch, kind, softcap):
    """Loss and gradient with the head a panel at a time are those with the dense head."""
    torch.manual_seed(0)
    monkeypatch.setattr(dense_weights, "PANEL", 64 * 30)  # several panels, the last one short
    monkeypatch.setattr(linear, "CHUNK_BYTES", 4 * 101 * 7)
    monkeypatch.setattr(linear, "FEWEST", 1)
    head = packed_layer(nn.Linear(64, 101, bias=False), lk.QuantConfig(kind)).quantized
    labels = torch.randint(0, 101, (25,))
    labels[3:6] = -100
    found = []
    for weight in (head, kernels.dequantize(head)):
        hidden = torch.randn(25, 64, generator=torch.Generator().manual_seed(1)) * 3
        hidden.requires_grad_()
        loss, count = kernels.linear_cross_entropy(hidden, weight, labels, softcap=softcap)
        loss.backward()
        found.append((loss.detach(), hidden.grad, count))
    assert found[0][2] == found[1][2] == 22
    # fp32 sums in another order
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(
            kernels.linear_cross_entropy(hidden, head, labels, softcap=softcap)[0], found[0][0]
        )


def test_nothing_to_quantize():
    with pytest.raises(lk.LorakitError, match=r"no nn\.Linear"):
        lk.quantize(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 33},
        {"block_size": 64.0},
        {"block_size": 16},
        {"quant_type": "fp3"},
        {"lm_head": "int4"},
    ],
)
def test_bad_config(options):
    with pytest.raises(lk.LorakitError, match=next(iter(options))):
        lk.QuantConfig(**options)


def test_a_skipped_name_must_exist():
    with pytest.raises(lk.LorakitError, match="'lm_haed' is no layer .did you mean 'lm_head'"):
        lk.quantize(net(), lk.QuantConfig(skip_modules=["lm_haed"]))
