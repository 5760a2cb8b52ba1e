"""NF4Linear as a layer: its product, its parameters, its moves; and the walk that places it."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.quantization import NF4Linear


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.ModuleDict({"lm_head": nn.Linear(24, 8)}))


def test_replaces_linear_layers_but_not_the_head():
    module = lk.quantize(net())
    assert isinstance(module[0], NF4Linear)
    assert type(module[2]["lm_head"]) is nn.Linear
    everything = lk.quantize(net(), lk.QuantConfig(skip_modules=[]))
    assert isinstance(everything[2]["lm_head"], NF4Linear)


@pytest.mark.parametrize("double_quant", [True, False])
def test_computes_with_the_dequantized_weight(double_quant):
    module = net()[0]
    bias = module.bias
    layer = NF4Linear.from_linear(module, lk.QuantConfig(double_quant=double_quant))
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantize(), bias))
    # NF4 of normal values: a relative error of about 9 percent
    error = (layer.dequantize() - module.weight).norm() / module.weight.norm()
    assert 0.05 < error < 0.12
    assert all(not p.requires_grad for n, p in layer.named_parameters() if n != "bias")
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.numel() == 40 * 24 // 2


def test_requantize():
    layer = NF4Linear.from_linear(net()[0], lk.QuantConfig())
    w = torch.randn(24, 40)
    layer.requantize(w)
    again = layer.dequantize()
    layer.requantize(again)
    assert (layer.dequantize() - again).abs().max() < 0.05 * again.abs().max()
    with pytest.raises(lk.LorakitError, match=r"the weight is \(40, 24\), the layer \(24, 40\)"):
        layer.requantize(w.t())


def test_to_dtype_keeps_the_scales():
    layer = NF4Linear.from_linear(net()[0], lk.QuantConfig())
    exact = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.dtype == torch.bfloat16
    assert layer.nested_absmax.dtype == layer.offset.dtype == torch.float32
    assert torch.equal(layer.dequantize(), exact.bfloat16())
    assert layer(torch.randn(2, 40).bfloat16()).dtype == torch.bfloat16
    layer.to(torch.float32)
    assert torch.equal(layer.dequantize(), exact)


def test_state_dict_round_trip():
    a = NF4Linear.from_linear(net()[0], lk.QuantConfig())
    b = NF4Linear.from_linear(nn.Linear(40, 24), lk.QuantConfig())
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.dequantize(), b.dequantize())


def test_meta_shells_have_the_final_shapes():
    with torch.device("meta"):
        shell = NF4Linear.from_linear(nn.Linear(100, 30), lk.QuantConfig(block_size=32))
    real = NF4Linear.from_linear(nn.Linear(100, 30), lk.QuantConfig(block_size=32))
    for (name, a), b in zip(shell.named_parameters(), real.parameters(), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name


def test_nothing_to_quantize():
    with pytest.raises(lk.LorakitError, match=r"no nn\.Linear"):
        lk.quantize(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("options", [{"block_size": 33}, {"block_size": 16}, {"quant_type": "fp3"}])
def test_bad_config(options):
    with pytest.raises(lk.LorakitError, match=next(iter(options))):
        lk.QuantConfig(**options)


def test_a_skipped_name_must_exist():
    with pytest.raises(lk.LorakitError, match="'lm_haed' is no layer .did you mean 'lm_head'"):
        lk.quantize(net(), lk.QuantConfig(skip_modules=["lm_haed"]))
