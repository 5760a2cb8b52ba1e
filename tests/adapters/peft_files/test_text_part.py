"""Adapters of multimodal models, loaded onto the text model alone; the truth is PEFT's model."""

import copy

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapters.manage import attached
from lorakit.models.multimodal import LAYOUTS, layout_of, name_in_layout, text_name
from tests.adapters.common import edit_config, edit_tensors
from tests.adapters.peft_files.adapters_of_peft import IDS, LOGITS, PREFIX, WEIGHTS
from tests.conftest import GEMMA3, TINY
from tests.models.wrappers import SIGLIP

TOWER = r"(vision_tower|visual)"


def gemma3(path):
    """A Gemma 3 whose files lorakit reads as they are."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={**TINY, **GEMMA3}, vision_config=SIGLIP, image_token_index=96
    )
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.save_pretrained(path)
    return model


def qwen2_5_vl(path):
    """A Qwen2.5-VL, and its text model in files of its own, as a Qwen2 model."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    sizes = {**TINY, "rms_norm_eps": 1e-6}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    theirs = {**sizes, "rope_parameters": {**rope, "mrope_section": [1, 1, 2]}}
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        Qwen2_5_VLConfig(text_config=theirs, vision_config=vision), attn_implementation="eager"
    )
    text = Qwen2ForCausalLM(Qwen2Config(**sizes, rope_parameters=rope))
    own = {text_name(name): tensor for name, tensor in model.state_dict().items()}
    text.load_state_dict({name: own[name] for name in text.state_dict()})
    text.save_pretrained(path)
    return model


@pytest.fixture(scope="module", params=[gemma3, qwen2_5_vl], ids=lambda make: make.__name__)
def base(request, tmp_path_factory):
    """A multimodal model of transformers, and the directory of its text model."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    return request.param(path).eval(), path


def text_model(base):
    return lk.load_model(base[1], dtype="float32")


def adapted(base, path, config):
    """The logits of a PEFT adapter on text, and the adapter saved at `path`."""
    model = peft.get_peft_model(copy.deepcopy(base[0]), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_B", "ia3_l", "modules_to_save")):
                parameter.add_(0.2 * torch.randn_like(parameter))
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    model.save_pretrained(path)
    return logits


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})


FORMS = {
    "ends of names, which both towers have": {"target_modules": ["q_proj", "down_proj"]},
    "a regex of the text model": {
        "target_modules": r".*language_model.*\.(q_proj|v_proj|down_proj)"
    },
    "a regex of whole names": {
        "target_modules": r"model\.language_model\.layers\.\d+\.self_attn\.(q|k)_proj"
    },
    "a regex that shuts the tower out": {
        "target_modules": rf"^(?!.*{TOWER}).*(q_proj|gate_proj|up_proj)$"
    },
    "whole names": {
        "target_modules": [
            "model.language_model.layers.0.self_attn.q_proj",
            "model.language_model.layers.1.mlp.up_proj",
        ]
    },
    "a regex excludes the tower": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "exclude_modules": rf".*{TOWER}.*",
    },
    "a list excludes a layer": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["language_model.layers.1.self_attn.q_proj", "patch_embedding"],
    },
    "ranks by both towers": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {rf".*{TOWER}.*": 3, r"language_model\.layers\.1\..*": 2},
        "alpha_pattern": {"model.language_model.layers.0.self_attn.q_proj": 20},
    },
    "layers by number, of the text model": {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "language_model.layers",
    },
    "layers by number, of either": {
        "target_modules": ["v_proj", "up_proj"],
        "layers_to_transform": [1],
    },
    "a norm trained whole": {
        "target_modules": r".*language_model.*q_proj",
        "modules_to_save": ["language_model.norm"],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_as_in_peft(base, tmp_path, form, caplog):
    truth = adapted(base, tmp_path, lora(**FORMS[form]))
    model = text_model(base)
    with torch.no_grad():
        before = model(IDS)
        lk.load_adapter(model, tmp_path)
        assert (model(IDS) - truth).abs().max() <= LOGITS
    assert (before - truth).abs().max() > 100 * LOGITS
    keys = load_file(tmp_path / WEIGHTS)
    left = sum("vision_tower" in key or "visual" in key for key in keys)
    assert (f"{left} tensors of the other towers are left aside" in caplog.text) == bool(left)


@pytest.mark.parametrize("form", ["a regex of the text model", "ranks by both towers"])
def test_what_was_loaded_is_saved_for_the_model_of_the_base_files(base, tmp_path, form):
    """The files of this Qwen2.5-VL hold the text model alone, those of Gemma 3 all of it."""
    adapted(base, tmp_path / "in", lora(**FORMS[form]))
    model = lk.load_adapter(text_model(base), tmp_path / "in")
    lk.save_adapter(model, tmp_path / "out")
    again = lk.load_adapter(text_model(base), tmp_path / "out")
    assert torch.equal(again(IDS), model(IDS))
    whole = model.source.surroundings is not None
    assert ("language_model" in (tmp_path / "out" / "adapter_config.json").read_text()) == whole
    assert all(("language_model" in key) == whole for key in load_file(tmp_path / "out" / WEIGHTS))


ADA = {"total_step": 10, "init_r": 4, "target_r": 2, "target_modules": ["q_proj", "v_proj"]}
NEW = {
    "all linear layers": lk.LoraConfig(r=4),
    "ranks": lk.LoraConfig(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 5}),
    "the head alone": lk.LoraConfig(
        target_modules=["lm_head", "q_proj"], rank_pattern={"lm_head": 2}
    ),
    "the embedding": lk.LoraConfig(
        target_modules=["embed_tokens"], rank_pattern={"embed_tokens": 2}, ensure_weight_tying=True
    ),
    "tokens": lk.LoraConfig(trainable_token_indices={"embed_tokens": [3, 4]}),
    "a norm": lk.LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"]),
    "pissa": lk.LoraConfig(r=4, init_lora_weights="pissa"),
    "ia3": lk.IA3Config(
        target_modules=["v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        modules_to_save=["model.norm"],
    ),
    "vera": lk.VeraConfig(r=8, target_modules=["q_proj"]),
    "adalora": lk.AdaLoraConfig(**ADA),
    "adalora, allocated": lk.AdaLoraConfig(**ADA),
}


@pytest.mark.parametrize("kind", NEW)
def test_peft_puts_a_new_adapter_onto_the_multimodal_model(tmp_path, kind):
    """The vision tower has a q_proj too, which gets nothing."""
    torch.manual_seed(0)
    theirs = gemma3(tmp_path / "base").eval()
    ours = lk.attach(lk.load_model(tmp_path / "base", dtype="float32"), NEW[kind])
    trained = [p for p in ours.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p) * 0.05)
    if kind == "adalora, allocated":
        for step in range(1, 11):
            for p in trained:
                p.grad = torch.randn_like(p)
            lk.adalora_allocate(ours, step)
    lk.save_adapter(ours, tmp_path / "a")
    again = lk.load_adapter(lk.load_model(tmp_path / "base", dtype="float32"), tmp_path / "a")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    with torch.no_grad():
        truth = ours(IDS)
        assert (again(IDS) - truth).abs().max() <= LOGITS  # fewer triplets in AdaLoRA's products
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert (logits - truth).abs().max() <= LOGITS
    towers = [n for n, _ in model.named_parameters() if "vision" in n and n.endswith("default")]
    assert not towers


def test_the_names_before_transformers_4_52(base, tmp_path):
    truth = adapted(base, tmp_path, lora(target_modules=r".*language_model.*\.(q|v)_proj"))

    def rename(tensors):
        for name in list(tensors):
            old = name.replace("model.language_model.", "language_model.model.")
            tensors[old] = tensors.pop(name)

    edit_tensors(tmp_path, rename)
    for targets in (
        r"language_model\.model\..*(q|v)_proj",
        r"model\.language_model\..*(q|v)_proj",  # a config that nobody renamed
    ):
        edit_config(tmp_path, target_modules=targets)
        model = lk.load_adapter(text_model(base), tmp_path)
        assert (model(IDS) - truth).abs().max() <= LOGITS


def test_an_adapter_of_another_tower_alone(base, tmp_path):
    adapted(base, tmp_path, lora(target_modules=rf".*{TOWER}.*(q_proj|qkv)"))
    model = text_model(base)
    with pytest.raises(lk.LorakitError, match="the adapter changes no layer of the text model"):
        lk.load_adapter(model, tmp_path)
    assert not attached(model)


def test_a_missing_tensor_is_still_an_error(base, tmp_path):
    adapted(base, tmp_path, lora(target_modules=r".*language_model.*q_proj"))
    key = f"{PREFIX}model.language_model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(lk.LorakitError, match=r"1.self_attn.q_proj.lora_B.weight is missing"):
        lk.load_adapter(text_model(base), tmp_path)


def test_ia3_names_its_inputs_by_the_tower_too(base, tmp_path):
    config = peft.IA3Config(
        target_modules=r".*language_model.*(v_proj|down_proj)",
        feedforward_modules=r".*language_model.*down_proj",
    )
    truth = adapted(base, tmp_path, config)
    model = lk.load_adapter(text_model(base), tmp_path)
    assert (model(IDS) - truth).abs().max() <= LOGITS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": "language_model.*("}, "no valid regex"),
        ({"target_modules": 3}, "target_modules"),
        ({"layers_to_transform": "vision"}, "layers_to_transform"),
        ({"rank_pattern": {"visual(": 3}}, "rank_pattern"),
    ],
)
def test_a_damaged_config_is_refused_as_it_stands(base, tmp_path, change, message):
    adapted(base, tmp_path, lora(target_modules=r".*language_model.*q_proj"))
    edit_config(tmp_path, **change)
    with pytest.raises(lk.LorakitError, match=message):
        lk.load_adapter(text_model(base), tmp_path)


@given(st.sampled_from(LAYOUTS), st.from_regex(r"(model|lm_head)\.[a-z.]{0,9}", fullmatch=True))
def test_a_name_there_and_back(layout, name):
    """Every layout gives a text model's name back."""
    there = name_in_layout(name, layout)
    assert text_name(there) == name
    if name.startswith("model."):
        assert layout_of([there]) == layout
