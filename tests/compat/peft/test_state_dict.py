"""The tensors of an adapter, taken from a model and given back, against peft's files."""

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.compat import peft as compat
from tests.compat.comparing import IDS, OPTIONS, logits

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be contained:UserWarning")


def test_state_dicts(base, adapters):
    ours = compat.PeftModel.from_pretrained(base(), adapters / "a")
    state = compat.get_peft_model_state_dict(ours)
    truth = load_file(adapters / "a" / "adapter_model.safetensors")
    assert state.keys() == truth.keys()
    other = compat.get_peft_model(base(), compat.LoraConfig(**OPTIONS))
    compat.set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other, IDS), logits(ours, IDS))
    key = next(iter(state))
    with pytest.raises(lk.LorakitError, match=r"lora_A.weight is missing"):
        compat.set_peft_model_state_dict(other, {k: v for k, v in state.items() if k != key})
    with pytest.raises(lk.LorakitError, match="tensor x belongs to no adapted layer"):
        compat.set_peft_model_state_dict(other, {**state, "x": state[key]})
    with pytest.raises(lk.LorakitError, match=r"is \(3,\), the model needs \(4, "):
        compat.set_peft_model_state_dict(other, {**state, key: torch.zeros(3)})


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_state_dict_of_a_start_that_is_a_part_of_the_weight(tiny_dir, start):
    """It is plain LoRA of twice the rank, and goes back into the same adapter to the bit."""
    config = compat.LoraConfig(**OPTIONS, init_lora_weights=start)
    model = compat.get_peft_model(lk.load_model(tiny_dir, dtype="float32"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = model(IDS)
    state = {k: v.clone() for k, v in compat.get_peft_model_state_dict(model).items()}
    assert all(8 in tensor.shape for tensor in state.values())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "lora_" in name or "start_" in name:
                tensor.normal_()
    assert not torch.allclose(model(IDS), before)
    compat.set_peft_model_state_dict(model, state)
    assert torch.equal(model(IDS), before)
    again = compat.get_peft_model_state_dict(model)
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "config",
    [
        lk.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        lk.VeraConfig(target_modules=["q_proj"], r=4),
        lk.AdaLoraConfig(target_modules=["q_proj"], total_step=9),
        lk.MissConfig(target_modules=["q_proj"], r=4),
        lk.PromptTuningConfig(num_virtual_tokens=3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_methods_are_saved_and_set(config, tiny_dir, tmp_path):
    model = compat.get_peft_model(lk.load_model(tiny_dir, dtype="float32"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    assert model.active_peft_config is model.peft_config["default"] is config
    model.save_pretrained(tmp_path)
    again = compat.PeftModel.from_pretrained(lk.load_model(tiny_dir, dtype="float32"), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    other = compat.get_peft_model(lk.load_model(tiny_dir, dtype="float32"), config)
    compat.set_peft_model_state_dict(other, compat.get_peft_model_state_dict(model))
    assert torch.equal(other(IDS), model(IDS))  # VeRA's frozen matrices come from the seed
