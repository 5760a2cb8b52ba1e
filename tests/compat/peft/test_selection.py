"""Which adapter computes and which one trains, against peft."""

import peft
import pytest
import torch
from torch import nn

from lorakit.compat import peft as compat
from tests.compat.comparing import IDS, OPTIONS, close, logits

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be contained:UserWarning")


def test_several_adapters(base, theirs, adapters):
    ours = compat.PeftModel.from_pretrained(base(), adapters / "a", adapter_name="a")
    theirs = peft.PeftModel.from_pretrained(theirs, adapters / "a", adapter_name="a")
    assert isinstance(ours, compat.PeftModelForCausalLM)
    for model in (ours, theirs):
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training
        model.load_adapter(adapters / "b", adapter_name="b")
        assert model.active_adapter == "a"
        assert not any(p.requires_grad for p in model.parameters())
    first = logits(ours, IDS)
    close(first, logits(theirs, IDS))
    mixed = {"input_ids": IDS, "adapter_names": ["__base__", "b"]}
    close(logits(ours, **mixed), logits(theirs, **mixed))
    with ours.disable_adapter(), theirs.disable_adapter():
        close(logits(ours, IDS), logits(theirs, IDS))
    for model in (ours, theirs):
        model.set_adapter("b")
        assert model.active_adapter == "b"
        assert model.active_adapters == ["b"]
        assert any(p.requires_grad for p in model.parameters())
    assert (logits(ours, IDS) - first).abs().max() > 0.1
    close(logits(ours, IDS), logits(theirs, IDS))
    for model in (ours, theirs):
        model.add_adapter("c", type(model.peft_config["a"])(**OPTIONS))
        assert model.active_adapter == "b"
        model.delete_adapter("b")
        assert model.active_adapter == "a"
        assert set(model.peft_config) == {"a", "c"}
    close(logits(ours, IDS), logits(theirs, IDS))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.delete_adapter("b"),
        lambda m: m.delete_adapter("a"),
        lambda m: m.merge_adapter(["a"]),
        lambda m: m.merge_adapter(["b"]),
    ],
)
def test_what_trains_afterwards_is_what_trains_in_peft(change, frozen):
    def trains(library):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        config = library.LoraConfig(target_modules=["0", "1"], r=2)
        model = library.get_peft_model(model, config, "a")
        model.add_adapter("b", config)
        model.set_adapter("a", inference_mode=frozen)
        change(model)
        every = [(n, p) for n, p in model.named_parameters() if "lora_" in n]
        return {("a" in n.split("."), p.requires_grad) for n, p in every}

    assert trains(compat) == trains(peft)
