"""What the model inside a PeftModel does, against peft."""

import peft
import pytest
import torch

import lorakit as lk
from lorakit.compat import peft as compat
from tests.compat.comparing import IDS, close, logits
from tests.conftest import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be contained:UserWarning")


def test_merging(base, theirs, adapters):
    model = base()
    before = logits(model, IDS)
    ours = compat.PeftModel.from_pretrained(model, adapters / "a", adapter_name="a")
    ours.load_adapter(adapters / "b", adapter_name="b")
    theirs = peft.PeftModel.from_pretrained(theirs, adapters / "b").merge_and_unload()
    ours.merge_adapter(["b"])
    close(logits(ours, IDS), logits(theirs, IDS))
    ours.unmerge_adapter()
    merged = ours.merge_and_unload(progressbar=True, safe_merge=True, adapter_names=["b"])
    assert merged is model
    assert not lk.adapter_names(model)
    close(logits(merged, IDS), logits(theirs, IDS))
    again = compat.PeftModel.from_pretrained(base(), adapters / "a")
    assert torch.equal(logits(again.unload(), IDS), before)


def test_what_a_script_asks_the_inner_model(adapters):
    """`base_model` switches, merges and disables as the PeftModel does."""
    models = []
    for module in (peft, compat):
        model = tiny_llama(num_key_value_heads=2, vocab_size=300)
        model = module.PeftModel.from_pretrained(model, adapters / "a", "a", torch_device="cpu")
        model.load_adapter(adapters / "b", "b", torch_device="cpu")
        assert model.peft_config["a"].inference_mode
        model.base_model.set_adapter("b")
        assert [model.base_model.active_adapter] == model.active_adapters == ["b"]
        adapted = logits(model, IDS)
        model.base_model.disable_adapter_layers()
        plain = logits(model, IDS)
        model.base_model.enable_adapter_layers()
        close(logits(model, IDS), adapted)
        model.base_model.merge_adapter()
        close(logits(model, IDS), adapted)
        model.base_model.unmerge_adapter()
        close(logits(model.base_model.merge_and_unload(), IDS), adapted)
        models.append((adapted, plain))
    for ours, truth in zip(*models, strict=True):
        close(ours, truth)
    assert (models[0][0] - models[0][1]).abs().max() > 1e-3
