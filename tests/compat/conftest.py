"""Models of either library, and adapters that peft wrote."""

import peft
import pytest
import torch

import lorakit as lk
from tests.compat.comparing import OPTIONS, randomize
from tests.conftest import tiny_llama


@pytest.fixture(params=["transformers", "decoder"])
def base(request, tiny_dir):
    """A function that makes the model of `tiny_dir`, of either library."""
    from transformers import AutoModelForCausalLM

    if request.param == "decoder":
        return lambda: lk.load_model(tiny_dir, dtype="float32")
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


@pytest.fixture
def theirs(tiny_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


@pytest.fixture
def adapters(tmp_path):
    """Directories `a` and `b` that peft wrote, with one adapter each."""
    config = peft.LoraConfig(**OPTIONS, task_type="CAUSAL_LM")
    model = tiny_llama(num_key_value_heads=2, vocab_size=300)
    model = peft.get_peft_model(model, config, adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    randomize(model).save_pretrained(tmp_path)
    return tmp_path
