"""quantize_report against what the loader makes of the same checkpoint."""

import math
import sys

import pytest
import torch

import lorakit as lk
from lorakit.models.packed_layers import PackedWeight


@pytest.mark.parametrize(
    "quant",
    ["nf4", {"quant_type": "int8"}, {"embed_tokens": "nf4", "search_scales": True}],
    ids=str,
)
def test_the_report_is_of_what_is_loaded(tiny_dir, quant):
    report = lk.quantize_report(tiny_dir, quant)
    model = lk.load_model(tiny_dir, dtype="float32", quantize=quant, device="cpu")
    dense = lk.load_model(tiny_dir, dtype="float32", device="cpu")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}
    assert [layer.name for layer in report.layers] == list(packed)
    for layer in report.layers:
        ours = packed[layer.name].dequantize().double()
        truth = dense.get_submodule(layer.name).weight.double()
        error = ((ours - truth).norm() / truth.norm()).item()
        cosine = torch.cosine_similarity(ours.flatten(), truth.flatten(), dim=0).item()
        # fp64 sums in another order
        assert layer.relative_error == pytest.approx(error, rel=1e-9)
        assert layer.cosine == pytest.approx(cosine, rel=1e-9)
        assert layer.bits_per_parameter == packed[layer.name].quantized.bits_per_parameter
        assert layer.shape == truth.shape
    inside = {id(p) for m in packed.values() for p in m.parameters()}
    stored = sum(8 * m.quantized.nbytes for m in packed.values())
    stored += sum(16 * p.numel() for p in model.parameters() if id(p) not in inside)
    total = sum(p.numel() for p in dense.parameters())
    assert report.bits_per_parameter == pytest.approx(stored / total)
    errors = [layer.relative_error for layer in report.worst(3)]
    assert errors == sorted((layer.relative_error for layer in report.layers), reverse=True)[:3]
    assert str(report).count("\n") > len(packed)


def test_refused(tiny_dir, tmp_path, monkeypatch):
    model = lk.load_model(tiny_dir, dtype="float32", quantize="nf4", device="cpu")
    lk.save_model(model, tmp_path / "packed", packed=True)
    with pytest.raises(lk.LorakitError, match="quantized already: report on what it was made from"):
        lk.quantize_report(tmp_path / "packed")
    with pytest.raises(lk.LorakitError, match="say how to quantize"):
        lk.quantize_report(tiny_dir, None)
    with torch.no_grad():
        bad = lk.load_model(tiny_dir, dtype="float32", device="cpu")
        bad.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    lk.save_model(bad, tmp_path / "bad")
    with pytest.raises(lk.LorakitError, match=r"layers.1.mlp.up_proj.weight: .*NaN"):
        lk.quantize_report(tmp_path / "bad")
    report = lk.quantize_report(tiny_dir)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(lk.LorakitError, match="plots need matplotlib"):
        report.save_plot(tmp_path / "a.png")


def test_zero_weights(tiny_dir, tmp_path):
    model = lk.load_model(tiny_dir, dtype="float32", device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    lk.save_model(model, tmp_path)
    report = lk.quantize_report(tmp_path)
    [zero] = [layer for layer in report.layers if layer.name.endswith("layers.0.mlp.up_proj")]
    assert (zero.relative_error, zero.cosine) == (0.0, 1.0)
