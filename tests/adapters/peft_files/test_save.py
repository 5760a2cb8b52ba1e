"""What save_adapter writes: PEFT reads it, and its own files look the same."""

import json

import pytest
from safetensors.torch import load_file

import lorakit as lk
from lorakit.adapters.manage import attached
from tests.adapters.common import IDS, hugging_face, nested, randomize
from tests.adapters.peft_files.adapters_of_peft import LOGITS


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.1\..*up_proj"])
def test_peft_loads_ours(model, tiny_dir, tmp_path, targets, rslora):
    from peft import PeftModel

    config = lk.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora)
    base = model(IDS)
    randomize(lk.attach(model, config))
    lk.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(hugging_face(tiny_dir), tmp_path).eval()
    assert (theirs(IDS).logits - model(IDS)).abs().max() <= LOGITS
    assert (model(IDS) - base).abs().max() > 0.1


def test_same_files_as_peft(model, tiny_dir, tmp_path):
    import peft

    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    randomize(lk.attach(model, lk.LoraConfig(**options)))
    lk.save_adapter(model, tmp_path / "ours")
    config = peft.LoraConfig(**options)
    peft.get_peft_model(hugging_face(tiny_dir), config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs")
    )
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }
    known = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(written) <= set(known)


def test_nothing_to_save(model, tmp_path):
    with pytest.raises(lk.LorakitError, match="no adapter is attached"):
        lk.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_no_adapter_is_selected(tmp_path):
    module = lk.attach(nested(), lk.LoraConfig(r=2))
    for wrapper in attached(module).values():
        wrapper.select(None)
    with pytest.raises(lk.LorakitError, match="save_adapter: no adapter is selected"):
        lk.save_adapter(module, tmp_path / "x")
    lk.save_adapter(module, tmp_path / "x", name="default")
    assert (tmp_path / "x" / "adapter_config.json").exists()
