"""What is shown of an adapter on disk, against sums in fp64."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from tests.adapters.common import edit_config, edit_tensors, hugging_face
from tests.adapters.peft_files.adapters_of_peft import KEY, PREFIX, WEIGHTS, peft_adapter


def test_what_is_shown(saved):
    report = lk.describe_adapter(saved)
    tensors = load_file(saved / WEIGHTS)
    assert len(report.layers) == 14
    assert report.warnings == []
    squares = 0.0
    for layer in report.layers:
        a, b = (tensors[f"{PREFIX}{layer.name}.lora_{part}.weight"].double() for part in "AB")
        assert (layer.rank, layer.alpha, layer.scaling) == (4, 6, 1.5)
        assert (layer.dtype, layer.bytes) == ("float32", 4 * (a.numel() + b.numel()))
        # fp64 sums in another order
        assert layer.norm_a == pytest.approx(a.norm().item(), rel=1e-12)
        assert layer.norm_b == pytest.approx(b.norm().item(), rel=1e-12)
        assert layer.norm_delta == pytest.approx((1.5 * b @ a).norm().item(), rel=1e-12)
        squares += (1.5 * b @ a).norm().item() ** 2
    assert report.norm_delta == pytest.approx(math.sqrt(squares), rel=1e-12)
    text = str(report)
    assert f"14 layers, rank 4, {report.bytes:,} bytes" in text
    assert "warning" not in text

    def spoil(tensors):
        tensors[KEY + ".lora_B.weight"].zero_()
        tensors[KEY.replace("q_proj", "k_proj") + ".lora_B.weight"][0, 0] = math.nan
        tensors["base_model.model.vera_A"] = torch.ones(2)

    edit_tensors(saved, spoil)
    edit_config(saved, rank_pattern={"layers.1.self_attn.v_proj": 3})
    broken, untrained, wrong, unknown = lk.describe_adapter(saved).warnings
    assert broken == "NaN or infinite values: model.layers.0.self_attn.k_proj"
    assert untrained.endswith("changes nothing: model.layers.0.self_attn.q_proj")
    assert wrong.endswith("adapter_config.json gives: model.layers.1.self_attn.v_proj")
    assert unknown == "tensors of no known kind: base_model.model.vera_A"
    assert str(lk.describe_adapter(saved)).count("\nwarning: ") == 4
    save_file({}, saved / WEIGHTS)
    assert lk.describe_adapter(saved).warnings == ["no layer is adapted"]


def test_what_is_counted(tiny_dir, tmp_path):
    base = hugging_face(tiny_dir)
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}}
    peft_adapter(base, tmp_path / "a", use_dora=True, modules_to_save=["lm_head"], **settings)
    report = lk.describe_adapter(tmp_path / "a")
    assert (report.modules_to_save, report.trainable_tokens, report.magnitudes) == (1, 2, 2)
    assert "2 with a magnitude (DoRA)" in str(report)
    peft_adapter(hugging_face(tiny_dir), tmp_path / "b", target_modules=["embed_tokens", "q_proj"])
    report = lk.describe_adapter(tmp_path / "b")
    assert (report.embeddings, report.copies, len(report.layers)) == (1, 1, 3)
    assert report.warnings == []
