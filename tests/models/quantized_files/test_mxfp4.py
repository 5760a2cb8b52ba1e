"""gpt-oss as published: experts in MXFP4, all of a layer in one tensor, against transformers."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.models.packed_layers import NF4Linear
from tests.conftest import FAMILY_VARIANTS, LOGITS, tiny
from tests.models.damage import fails

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

IDS = torch.arange(24).view(2, 12)
SIZES = {"hidden_size": 64, "intermediate_size": 32}  # multiples of a block


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A tiny model whose expert weights are random codes, with scales from 2^-4 to 1/2."""
    path = tmp_path_factory.mktemp("mxfp4") / "gpt_oss"
    tiny("gpt_oss", **{**FAMILY_VARIANTS["gpt_oss"][1], **SIZES}).save_pretrained(path)
    found, g = load_file(path / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in found if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = found.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=g)
        scales = torch.randint(123, 127, (experts, rows, columns // 32), generator=g)
        found |= {f"{name}_blocks": blocks.byte(), f"{name}_scales": scales.byte()}
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    said = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return path


def test_experts_have_the_bits_and_the_model_the_logits_of_transformers(gpt_oss, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lorakit"):
        model = lk.load_model(gpt_oss, dtype="float32", device="cpu")
    assert "read MXFP4 (blocks of 32): 4 tensors" in caplog.text
    found = load_file(gpt_oss / "model.safetensors")
    name = "model.layers.1.mlp.experts.{}_proj"
    for kind in ("gate_up", "down"):
        parts = (found[f"{name.format(kind)}_{part}"] for part in ("blocks", "scales"))
        dense = convert_moe_packed_tensors(*parts, dtype=torch.float32)  # [E, in, out]
        for expert, layers in enumerate(model.model.layers[1].mlp.experts):
            whole = dense[expert].t()
            if kind == "down":
                assert torch.equal(layers.down_proj.weight, whole)
            else:
                assert torch.equal(layers.gate_proj.weight, whole[::2])
                assert torch.equal(layers.up_proj.weight, whole[1::2])
    theirs = AutoModelForCausalLM.from_pretrained(
        gpt_oss,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    with torch.no_grad():
        assert (model(IDS) - theirs(IDS).logits).abs().max() <= LOGITS
    lk.save_model(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert (model(IDS) - back(IDS).logits).abs().max() <= LOGITS


def test_training_on_experts_that_are_packed_again(gpt_oss, tmp_path):
    lk.save_model(lk.load_model(gpt_oss, dtype="float32"), tmp_path / "dense")
    model, expected = (
        lk.load_model(path, dtype="float32", quantize="nf4", device="cpu")
        for path in (gpt_oss, tmp_path / "dense")
    )
    assert isinstance(model.model.layers[0].mlp.experts[4].up_proj, NF4Linear)
    assert type(model.model.layers[0].mlp.router) is torch.nn.Linear
    assert torch.equal(model(IDS), expected(IDS))
    lk.attach(model, lk.LoraConfig(r=4, target_modules=["q_proj", "experts.3.up_proj"]))
    loss, _ = model.loss(IDS, IDS)
    loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {
        f"model.layers.{i}.{layer}.adapters.default.lora_B"
        for i in range(2)
        for layer in ("self_attn.q_proj", "mlp.experts.3.up_proj")
    }


BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"
SCALES = BLOCKS.replace("blocks", "scales")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop(SCALES), "experts.down_proj: .*down_proj_scales is missing"),
        (lambda f: f.pop(BLOCKS), "belongs to no part|is missing"),
        (lambda f: f[SCALES].fill_(255), "experts.down_proj: its scales hold NaN or infinite"),
        (lambda f: f.update({SCALES: f[SCALES][:, 1:].clone()}), r"its scales are \(5, 63, 1\)"),
        (
            lambda f: f.update({BLOCKS: f[BLOCKS][..., 1:].clone()}),
            "its blocks are .* not .experts",
        ),
        (
            lambda f: f.update({n: f[n][:, 2:].clone() for n in (BLOCKS, SCALES)}),
            r"down_proj is \(5, 32, 62\), the config asks for \(5, 32, 64\)",
        ),
        (lambda f: f.update({BLOCKS: f[BLOCKS].short()}), "down_proj_blocks holds I16, not U8"),
    ],
)
def test_damage_is_said_in_one_sentence(gpt_oss, tmp_path, change, message):
    found = load_file(gpt_oss / "model.safetensors")
    change(found)
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((gpt_oss / "config.json").read_bytes())
    fails(tmp_path, message)
