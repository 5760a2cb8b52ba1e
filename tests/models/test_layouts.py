"""Model files as other tools leave them: read if only names differ, else named as what they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from tests.models.damage import fails


def rename(path, name_of):
    file = path / "model.safetensors"
    tensors = {name_of(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


NAMES = {
    "DDP": lambda name: f"module.{name}",
    "compiled DDP": lambda name: f"module._orig_mod.{name}",
    "DDP inside compile": lambda name: f"_orig_mod.module.{name}",
    "FSDP": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "Fabric": lambda name: f"_forward_module.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "DDP around PEFT": lambda name: f"module.base_model.model.{name}",
    "a text model's names in a multimodal one": lambda name: f"language_model.{name}",
    "the same in transformers 5": lambda name: name.replace("model.", "model.language_model.", 1),
}


@pytest.mark.parametrize("name_of", NAMES.values(), ids=NAMES)
def test_longer_names_are_read_with_one_line_in_the_log(copy, name_of, caplog):
    expected = lk.load_model(copy, dtype="float32").state_dict()
    rename(copy, name_of)
    model = lk.load_model(copy, dtype="float32")
    assert len(caplog.records) == 1
    assert "names of tensors come from" in caplog.text
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_what_was_read_by_longer_names_is_saved_by_its_own(copy, tmp_path):
    expected = load_file(copy / "model.safetensors")
    rename(copy, lambda name: f"module.{name}")
    lk.save_model(lk.load_model(copy, dtype="float32"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_peft_model_that_was_saved_whole(copy):
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    save_file(model.state_dict(), copy / "model.safetensors")
    fails(copy, "is of an adapter, in the file of its base model: save the adapter by itself")


def edit_config(path, **change):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_mlx_quantized(copy):
    quantization = {"group_size": 64, "bits": 4}
    edit_config(copy, quantization=quantization)
    fails(copy, "config.json: MLX has quantized the model, which is not supported: load its 16-bit")
    edit_config(copy, quantization_config=quantization)  # mlx_lm writes both
    fails(copy, "MLX has quantized the model")


def test_experts_of_mlx(copy):
    rename(copy, lambda name: name.replace("0.mlp.gate_proj", "0.mlp.switch_mlp.gate_proj"))
    fails(copy, r"tensor model\.layers\.0\.mlp\.switch_mlp\.gate_proj\.weight holds all experts")


HELD = {
    "pytorch_model.bin": "pytorch_model.bin, and pickled weights are not read: `AutoModel",
    "pytorch_model_fsdp.bin": "a checkpoint of FSDP .*weights_only=True",
    "pytorch_model_fsdp_0/__0_0.distcp": "FSDP in pieces: `accelerate merge-weights .*fsdp_0 OUT`",
    "__0_0.distcp": "FSDP in pieces: `accelerate merge-weights",
    "global_step200/mp_rank_00_model_states.pt": r"DeepSpeed \(global_step200\).*zero_to_fp32",
    "mp_rank_00_model_states.pt": r"DeepSpeed \(mp_rank_00_model_states.pt\).*zero_to_fp32",
    "consolidated.00.pth": "consolidated.00.pth, in Meta's or Mistral's own format",
    "model-00001-of-00002.safetensors": "shards without an index",
    "adapter_config.json": "an adapter: load the model that it was trained on",
    "model-Q4_K_M.gguf": "a GGUF file: name it, .*/model-Q4_K_M.gguf",
    "weights.00.npz": "weights.00.npz, weights of an old MLX",
    "model.pt": "model.pt, and pickled weights are not read",
    "last.ckpt": "last.ckpt, and pickled weights are not read",
}


@pytest.mark.parametrize("file", HELD)
@pytest.mark.parametrize("config", [True, False], ids=["config", "no config"])
def test_other_files_are_named_as_what_they_are(copy, file, config):
    (copy / "model.safetensors").unlink()
    (copy / file).parent.mkdir(exist_ok=True)
    (copy / file).touch()
    if not config:
        (copy / "config.json").unlink()
    missing = r"neither model\.safetensors nor" if config else r"config\.json is missing, and"
    fails(copy, f"{missing}.* {HELD[file]}")
