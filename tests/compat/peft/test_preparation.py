"""Models made ready for training in few bits."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.compat import peft as compat
from tests.compat.comparing import IDS, OPTIONS, logits
from tests.conftest import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be contained:UserWarning")


@pytest.mark.parametrize("kind", ["transformers", "decoder"])
def test_preparing_for_few_bits(tiny_dir, kind):
    model = tiny_llama(num_key_value_heads=2, vocab_size=300)
    if kind == "decoder":
        model = lk.load_model(tiny_dir, dtype="float32")
    model = lk.quantize(model).to(torch.bfloat16)
    dtypes = [p.dtype for p in model.parameters()]
    assert compat.prepare_model_for_kbit_training(model) is model
    assert [p.dtype for p in model.parameters()] == dtypes
    assert not any(p.requires_grad for p in model.parameters())
    model = compat.get_peft_model(model, compat.LoraConfig(**OPTIONS)).train()
    logits(model, IDS).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad.abs().max() > 0, name


def test_reentrant_checkpointing_reaches_the_first_adapter():
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model = compat.get_peft_model(model, compat.LoraConfig(**OPTIONS)).train()
    model(IDS, labels=IDS).loss.backward()
    first = model.base_model.model.model.layers[0].self_attn.q_proj
    assert first.lora_B.grad.abs().max() > 0


def test_checkpointing_of_what_has_none():
    with pytest.raises(lk.LorakitError, match="a Linear has no gradient checkpointing"):
        compat.prepare_model_for_kbit_training(nn.Linear(2, 2))
    compat.prepare_model_for_kbit_training(nn.Linear(2, 2), use_gradient_checkpointing=False)
