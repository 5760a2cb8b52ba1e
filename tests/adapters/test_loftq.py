"""LoftQ: the adapter starts as the best low-rank approximation of the quantization error."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.adapters.start import start_adapter


def quantized(width=96, r=8, seed=0, **quant):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(width, 64), nn.Linear(64, width, bias=False))
    weights = {name: layer.weight.detach().clone() for name, layer in module.named_children()}
    lk.quantize(module, lk.QuantConfig(**quant))
    lk.attach(module, lk.LoraConfig(r=r, lora_alpha=3 * r))
    return module, weights


@pytest.mark.parametrize("quant", [{}, {"quant_type": "fp4"}, {"search_scales": True}])
def test_the_first_iteration_is_the_truncated_svd(quant):
    module, weights = quantized(**quant)
    codes = {name: layer.base.weight.clone() for name, layer in lora_layers(module).items()}
    result = lk.loftq(module, weights)
    for name, layer in lora_layers(module).items():
        assert torch.equal(layer.base.weight, codes[name])
        W = weights[name].double()
        residue = W - layer.base.dequantize().double()
        values = torch.linalg.svdvals(residue)
        update = 3 * (layer.lora_B.double() @ layer.lora_A.double())
        left = (residue - update).norm()
        # subspace iteration finds what rank 8 can hold to 2 percent
        assert residue.norm() ** 2 - left**2 > 0.98 * values[:8].square().sum()
        assert result.before[name] == pytest.approx((residue.norm() / W.norm()).item(), rel=1e-5)
        assert result.after[name] == pytest.approx((left / W.norm()).item(), rel=1e-5)
        assert layer.lora_A.requires_grad
    mean = sum(result.after.values()) / 2
    assert str(result).endswith(f"of 2 layers {sum(result.before.values()) / 2:.4f} -> {mean:.4f}")


def test_more_iterations_lower_the_error_and_change_the_base():
    module, weights = quantized()
    codes = module[0].base.weight.clone()
    once = lk.loftq(module, weights)
    five = lk.loftq(module, weights, iterations=5)
    assert five.before == once.before
    assert all(five.after[name] < once.after[name] for name in weights)
    assert not torch.equal(module[0].base.weight, codes)
    x = torch.randn(5, 96)
    layer = module[0]
    truth = x @ weights["0"].t() + layer.base.bias
    with torch.no_grad():
        error = (layer(x) - truth).norm() / truth.norm()
    assert error < 1.2 * five.after["0"]  # the forward pass computes what was measured


def test_a_layer_that_stays_dense_has_no_error_and_starts_as_any():
    """Routers of experts stay dense, and target_modules: all-linear adapts them too."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    weights = {"0": module[0].weight.detach().clone()}
    lk.quantize(module, lk.QuantConfig(skip_modules=["1"]))
    lk.attach(module, lk.LoraConfig(r=4, init_lora_weights="loftq"))
    result = lk.loftq(module, weights)
    assert list(result.after) == ["0"]
    assert result.after["0"] < result.before["0"]
    assert module[1].lora_A.any()
    assert not module[1].lora_B.any()
    assert start_adapter(module, lambda: []) is None


@pytest.mark.parametrize("r", [1, 64, 100])
def test_any_rank(r):
    """A rank beyond the matrix's own leaves nothing of the error."""
    module, weights = quantized(r=r)
    result = lk.loftq(module, weights)
    for name in weights:
        assert result.after[name] < result.before[name]
        assert r < 64 or result.after[name] < 1e-5
    assert all(torch.isfinite(layer.lora_A).all() for layer in lora_layers(module).values())


def test_on_a_loaded_model(tiny_dir):
    """The originals are read again from the model's files; the adapter fits any NF4 of them."""
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4", device="cpu")
    dense = lk.load_model(tiny_dir, dtype="float32", device="cpu")
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = (model(ids) - dense(ids)).norm()
        lk.attach(model, lk.LoraConfig(r=8))
        result = lk.loftq(model)
        assert (model(ids) - dense(ids)).norm() < before
    assert len(result.before) == 14
    assert all(result.after[name] < result.before[name] for name in result.before)


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"init_lora_weights": False}]
)
def test_whatever_the_adapter_held(options):
    """What is computed is the original weight but for what is left of the error."""
    plain, weights = quantized()
    truth = lk.loftq(plain, weights)
    module, _ = quantized()
    lk.detach(module)
    lk.attach(module, lk.LoraConfig(r=8, lora_alpha=24, **options))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    result = lk.loftq(module, weights)
    for name, layer in lora_layers(module).items():
        # the subspace is found from another random start
        assert result.after[name] == pytest.approx(truth.after[name], rel=1e-2)
        W = weights[name]
        error = (layer.weight - W).norm() / W.norm()
        assert error == pytest.approx(result.after[name], rel=1e-4)  # fp32 norms
        x = torch.randn(5, layer.in_features)
        y = x @ layer.weight.t() + (0 if layer.bias is None else layer.bias)
        # fp32 sums of 96 products in another order
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


def test_the_selected_adapter_alone():
    module, weights = quantized()
    lk.attach(module, lk.LoraConfig(r=4, target_modules=["1"]), name="b")
    first = module[0].adapters["default"].lora_A.clone()
    result = lk.loftq(module, weights)
    assert result.after.keys() == {"1"}
    assert torch.equal(module[0].adapters["default"].lora_A, first)


def test_an_embedding_is_refused():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    weights = {name: layer.weight.detach().clone() for name, layer in module.named_children()}
    lk.quantize(module)
    lk.attach(module, lk.LoraConfig(r=4, target_modules=["0", "1"]))
    with pytest.raises(lk.LorakitError, match="0 is an embedding; leave it out"):
        lk.loftq(module, weights)


def test_an_adapter_in_bf16():
    module, weights = quantized()
    module.to(torch.bfloat16)
    result = lk.loftq(module, weights, iterations=2)
    assert all(result.after[name] < result.before[name] for name in weights)


def test_the_same_seed_gives_the_same_bits():
    a, weights = quantized()
    b, _ = quantized()
    for module in (a, b):
        torch.manual_seed(3)
        lk.loftq(module, weights)
    assert torch.equal(a[0].lora_A, b[0].lora_A)
    assert torch.equal(a[1].lora_B, b[1].lora_B)


def test_what_cannot_be_done_changes_nothing(tiny_dir, tmp_path):
    module, weights = quantized()
    start = module[0].lora_A.detach().clone()
    with pytest.raises(lk.LorakitError, match="the original weight of 1 is missing"):
        lk.loftq(module, {"0": weights["0"]})
    with pytest.raises(lk.LorakitError, match=r"the original of 1 is \(3, 3\), the layer \(96, 64"):
        lk.loftq(module, weights | {"1": torch.ones(3, 3)})
    with pytest.raises(lk.LorakitError, match="not loaded from a file"):
        lk.loftq(module)
    for wrong in (0, 1.5, True):
        with pytest.raises(lk.LorakitError, match="iterations must be a whole number from 1 on"):
            lk.loftq(module, weights, iterations=wrong)
    lk.merge(module)
    with pytest.raises(lk.LorakitError, match="the adapter of 0 is merged"):
        lk.loftq(module, weights)
    lk.unmerge(module)
    bad = weights["0"].clone()
    bad[0, 0] = torch.nan
    with pytest.raises(lk.LorakitError, match="the original weight of 0 holds NaN"):
        lk.loftq(module, weights | {"0": bad})
    assert torch.equal(module[0].lora_A, start)
    with pytest.raises(lk.LorakitError, match="no adapter"):
        lk.loftq(nn.Linear(2, 2), weights)
    dense = lk.attach(nn.Sequential(nn.Linear(4, 4)), lk.LoraConfig(r=2))
    with pytest.raises(lk.LorakitError, match="0 is dense"):
        lk.loftq(dense, {"0": torch.ones(4, 4)})

    model = lk.load_model(tiny_dir, quantize="nf4", device="cpu")
    lk.save_model(model, tmp_path, packed=True)
    again = lk.attach(lk.load_model(tmp_path, device="cpu"))
    with pytest.raises(lk.LorakitError, match="is quantized itself"):
        lk.loftq(again)
