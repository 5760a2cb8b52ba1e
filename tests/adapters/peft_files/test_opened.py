"""Keys of adapter files that are longer than PEFT writes them, against the same file as it was."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from tests.adapters.common import CONFIG, IDS, edit_config, filled, hugging_face
from tests.adapters.peft_files.adapters_of_peft import PREFIX, WEIGHTS, peft_logits


def rename(path, name_of):
    tensors = load_file(path / WEIGHTS)
    save_file({name_of(key): tensor for key, tensor in tensors.items()}, path / WEIGHTS)


def named(key):
    return key.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine.")


KEYS = {
    "state_dict": named,
    "DDP": lambda key: f"module.{key}",
    "state_dict of DDP": lambda key: f"module.{named(key)}",
    "compiled, then PEFT": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "PEFT, then compiled": lambda key: f"_orig_mod.{key}",
    "FSDP": lambda key: key.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "checkpointing": lambda key: key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "Fabric": lambda key: f"_forward_module.{key}",
    "PEFT in PEFT": lambda key: f"{PREFIX}{key}",
    "without a prefix": lambda key: key.removeprefix(PREFIX),
}


@pytest.mark.parametrize("name_of", KEYS.values(), ids=KEYS)
def test_longer_keys_are_read_as_pefts(saved, tiny_dir, tmp_path, name_of, caplog):
    truth, shown = peft_logits(hugging_face(tiny_dir), saved), str(lk.describe_adapter(saved))
    converted = lk.convert_adapter(saved, tmp_path / "plain")
    rename(saved, name_of)
    assert str(lk.describe_adapter(saved)) == shown
    assert lk.convert_adapter(saved, tmp_path / "again").layers == converted.layers
    caplog.clear()
    model = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), saved)
    assert len(caplog.records) <= 2  # a line for the wrapper, and one for the adapter's name
    # two fp32 implementations of a tiny model
    torch.testing.assert_close(model(IDS), truth, rtol=0, atol=1e-4)


def test_the_names_of_layers_in_the_config(saved, tiny_dir):
    """PEFT writes the full names of the layers in a compiled model for "all-linear"."""
    theirs = peft_logits(hugging_face(tiny_dir), saved)
    places = json.loads((saved / "adapter_config.json").read_text())["target_modules"]
    ends = [f"_orig_mod.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    rest = [place for place in places if place != "q_proj"]
    edit_config(saved, target_modules=[*ends, *rest], rank_pattern={ends[0]: 4})
    model = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), saved)
    torch.testing.assert_close(model(IDS), theirs, rtol=0, atol=1e-4)


def test_modules_that_were_trained_whole(tiny_dir, tmp_path):
    model = peft.get_peft_model(
        hugging_face(tiny_dir),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    )
    filled(model).save_pretrained(tmp_path)
    with torch.no_grad():
        truth = model.eval()(IDS).logits
    rename(tmp_path, lambda key: key.replace("model.norm", "model.norm.modules_to_save.default"))
    assert any("modules_to_save.default" in key for key in load_file(tmp_path / WEIGHTS))
    ours = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path)
    torch.testing.assert_close(ours(IDS), truth, rtol=0, atol=1e-4)


def test_several_adapters_in_one_file(saved, tiny_dir):
    tensors = load_file(saved / WEIGHTS)
    both = {key.replace("lora_A.", "lora_A.b."): tensor for key, tensor in tensors.items()}
    both |= {key.replace("lora_A.", "lora_A.a."): tensor for key, tensor in tensors.items()}
    save_file({key: tensor.clone() for key, tensor in both.items()}, saved / WEIGHTS)
    model = lk.load_model(tiny_dir, dtype="float32")
    with pytest.raises(lk.LorakitError, match="the file holds several adapters, a, b: save each"):
        lk.load_adapter(model, saved)
    assert not lk.adapter_names(model)


def test_a_compiled_module_keeps_its_names(tmp_path):
    torch.manual_seed(0)

    def fresh():
        return torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), backend="eager")

    module = filled(lk.attach(fresh(), CONFIG))
    lk.save_adapter(module, tmp_path)
    assert all("_orig_mod" in key for key in load_file(tmp_path / WEIGHTS))
    again = lk.load_adapter(fresh(), tmp_path)
    found, truth = dict(again.named_parameters()), dict(module.named_parameters())
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], truth[key]) for key in truth if "lora_" in key)


def test_tensors_that_were_not_gathered(saved, tiny_dir):
    tensors = load_file(saved / WEIGHTS)
    save_file({key: tensor.new_empty(0) for key, tensor in tensors.items()}, saved / WEIGHTS)
    with pytest.raises(lk.LorakitError, match="is empty: DeepSpeed ZeRO-3 or FSDP saved it before"):
        lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), saved)


def test_paths_that_are_no_directory_of_an_adapter(saved, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(lk.LorakitError, match="is a file: give the directory of the adapter, .*in"):
        lk.load_adapter(model, saved / WEIGHTS)
    saved.rename(tmp_path / "first")
    with pytest.raises(lk.LorakitError, match="does not exist; there is one in first: name that"):
        lk.load_adapter(model, tmp_path)
