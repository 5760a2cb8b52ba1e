"""The text model of a multimodal model: read alone, written back among the other towers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.models.multimodal import text_name
from tests.conftest import LOGITS, QWEN_LINEAR, tiny
from tests.models.damage import fails
from tests.models.wrappers import WRAPPED, wrapped

IDS = torch.arange(24).view(2, 12)


def tensors(path):
    found = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


def save_as_published(theirs, path):
    """Save with transformers, but experts of Qwen3-VL-MoE transposed as in the published files."""
    theirs.save_pretrained(path)
    if theirs.config.model_type == "qwen3_vl_moe":
        found = {
            name: tensor.mT.contiguous() if ".experts." in name else tensor
            for name, tensor in tensors(path).items()
        }
        save_file(found, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path, change):
    file = path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.mark.parametrize("name", WRAPPED)
def test_the_text_model_is_read_alone_and_written_back(tmp_path, name):
    """Its logits are transformers'; the other tensors and settings come back as they were."""
    theirs = wrapped(name)
    save_as_published(theirs, tmp_path / "a")
    model = lk.load_model(tmp_path / "a", dtype="float32")
    with torch.no_grad():
        assert (model(IDS) - theirs(IDS).logits).abs().max() <= LOGITS
        up = next(
            name
            for name, _ in model.named_parameters()
            if name.endswith("up_proj.weight") and ".experts." not in name
        )
        model.get_parameter(up).mul_(2)
    lk.save_model(model, tmp_path / "b", max_shard_size=60_000)
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    changed = [n for n in before if n.endswith(up.removeprefix("model.")) and "vis" not in n]
    assert len(changed) == 1
    assert any("vis" in name for name in after)
    for each, tensor in after.items():
        assert torch.equal(tensor, before[each] * (2 if each in changed else 1)), each
    back = (
        type(theirs)
        .from_pretrained(tmp_path / "b", dtype=torch.float32, attn_implementation="eager")
        .eval()
    )
    with torch.no_grad():
        assert (model(IDS) - back(IDS).logits).abs().max() <= LOGITS
    assert back.config.vision_config.to_dict() == theirs.config.vision_config.to_dict()
    found, given = (each.config.text_config.rope_parameters for each in (back, theirs))
    assert found | given == found  # the sections that images need, and all else
    again = lk.load_model(tmp_path / "b", dtype="float32")
    assert again.config == model.config


@pytest.mark.parametrize("whole", [True, False])
def test_layers_that_draft_tokens_are_carried_along(tmp_path, whole):
    theirs = wrapped("qwen3_5") if whole else tiny("qwen3_5_text", **QWEN_LINEAR)
    theirs.save_pretrained(tmp_path / "a")
    drafts = {
        "mtp.fc.weight": torch.randn(32, 64),
        "mtp.layers.0.self_attn.q_proj.weight": IDS * 1.0,
    }
    found = tensors(tmp_path / "a")
    save_file(found | drafts, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = lk.load_model(tmp_path / "a", dtype="float32")
    assert (model(IDS) - theirs(IDS).logits).abs().max() <= LOGITS
    with pytest.raises(lk.LorakitError, match="no part of the text model are read from"):
        lk.save_model(model, tmp_path / "a")
    lk.save_model(model, tmp_path / "b")
    after = tensors(tmp_path / "b")
    assert after.keys() == {*found, *drafts}
    assert all(torch.equal(after[name], tensor) for name, tensor in drafts.items())


def test_names_as_transformers_has_them_in_memory(multimodal, tmp_path):
    source, theirs = multimodal
    shutil.copytree(source, tmp_path / "a")
    there = {
        name.replace("language_model.model", "model.language_model"): tensor
        for name, tensor in tensors(tmp_path / "a").items()
    }
    save_file(there, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = lk.load_model(tmp_path / "a", dtype="float32")
    assert (model(IDS) - theirs(IDS).logits).abs().max() <= LOGITS
    lk.save_model(model, tmp_path / "b")
    found = tensors(tmp_path / "b")
    assert found.keys() == there.keys()
    assert all(torch.equal(found[name], there[name]) for name in there)


def test_qwen2_5_vl_as_it_is_published(tmp_path):
    """Its keys for the text model lie beside those of the whole, and stay there."""
    theirs = wrapped("qwen2_5_vl")
    theirs.save_pretrained(tmp_path / "a")

    def flat(config):
        text = config.pop("text_config")
        rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
        del text["rope_parameters"], text["model_type"]
        return text | config | {"rope_theta": 1e4, "rope_scaling": rope}

    edit_config(tmp_path / "a", flat)
    model = lk.load_model(tmp_path / "a", dtype="float32")
    lk.resize_embeddings(model, 100)
    lk.save_model(model, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "text_config" not in config
    assert (config["model_type"], config["vocab_size"]) == ("qwen2_5_vl", 100)
    back = (
        type(theirs)
        .from_pretrained(tmp_path / "b", dtype=torch.float32, attn_implementation="eager")
        .eval()
    )
    with torch.no_grad():
        assert (back(IDS).logits[..., :97] - theirs(IDS).logits).abs().max() <= LOGITS
    assert back.config.text_config.rope_parameters["mrope_section"] == [1, 1, 2]


@pytest.mark.parametrize(
    ("name", "of_text", "of_whole"),
    [
        ("mistral3", None, None),
        ("mistral3", False, None),
        ("mistral3 tied", None, None),
        ("mistral3 tied", None, True),
        ("mistral3 tied", True, False),
    ],
)
def test_a_tied_head_is_said_in_either_place_or_by_the_files(
    tmp_path, caplog, name, of_text, of_whole
):
    wrapped(name).save_pretrained(tmp_path)

    def said(config):
        config["tie_word_embeddings"] = of_whole
        config["text_config"]["tie_word_embeddings"] = of_text
        return config

    edit_config(tmp_path, said)
    model = lk.load_model(tmp_path, dtype="float32")
    assert (model.lm_head is None) == (name == "mistral3 tied")
    assert not caplog.records


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
