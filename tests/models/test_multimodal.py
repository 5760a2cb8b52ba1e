"""The text model of a multimodal model: read alone, written back among the other towers."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.models.multimodal import text_name
from tests.conftest import LOGITS
from tests.models.damage import fails

IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("layout", ["language_model.model", "model.language_model"])
def test_the_text_model_is_read_alone_and_written_back(multimodal, tmp_path, layout):
    from transformers import Gemma3ForConditionalGeneration

    source, theirs = multimodal
    shutil.copytree(source, tmp_path / "a")
    if layout != "language_model.model":
        found = load_file(tmp_path / "a" / "model.safetensors")
        renamed = {name.replace("language_model.model", layout): t for name, t in found.items()}
        save_file(renamed, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = lk.load_model(tmp_path / "a", dtype="float32")
    with torch.no_grad():
        assert (model(IDS) - theirs(IDS).logits).abs().max() <= LOGITS
        model.model.layers[0].mlp.up_proj.weight *= 2
    lk.save_model(model, tmp_path / "b", max_shard_size=60_000)
    before, after = {}, {}
    for path, found in ((tmp_path / "a", before), (tmp_path / "b", after)):
        for file in path.glob("*.safetensors"):
            found |= load_file(file)
    changed = f"{layout}.layers.0.mlp.up_proj.weight"
    assert before.keys() == after.keys()
    assert any("vision_tower" in name for name in after)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] * (2 if name == changed else 1)), name
    back = Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "b", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert (model(IDS) - back(IDS).logits).abs().max() <= LOGITS


def test_files_without_a_text_model(multimodal, tmp_path):
    source, _ = multimodal
    shutil.copytree(source, tmp_path / "a")
    found = load_file(tmp_path / "a" / "model.safetensors")
    vision = {name: t for name, t in found.items() if "language_model" not in name}
    save_file(vision, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    fails(tmp_path / "a", "the files hold no text model")


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("model.language_model.layers.0.mlp", "model.layers.0.mlp"),
        ("language_model.model.layers.0.mlp", "model.layers.0.mlp"),
        ("language_model.lm_head", "lm_head"),
        ("language_model.layers.0.mlp", "layers.0.mlp"),
        ("model.layers.0.mlp", "model.layers.0.mlp"),
        ("q_proj", "q_proj"),
    ],
)
def test_text_name(name, own):
    assert text_name(name) == own
