"""A tiny model with room for chats, two adapters, and an endpoint that serves them."""

import pytest
import torch

import lorakit as lk
from tests.conftest import tiny_llama, write_tokenizer
from tests.serving.running import Truth, running


@pytest.fixture(scope="package")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "tiny"
    tiny_llama(num_key_value_heads=2, vocab_size=300, max_position_embeddings=512).save_pretrained(
        path
    )
    write_tokenizer(path)
    return path


@pytest.fixture(scope="package")
def adapters(tiny):
    """Two adapters that change what the model writes, by the names that clients use."""
    found = {}
    for seed, name in enumerate(("ann", "bob.v2")):
        model = lk.attach(lk.load_model(tiny, dtype="float32"), lk.LoraConfig(r=2))
        torch.manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, 0, 0.3)
        found[name] = tiny.parent / name
        lk.save_adapter(model, found[name])
    return found


@pytest.fixture(scope="package")
def truth(tiny, adapters):
    return Truth(tiny, adapters)


@pytest.fixture(scope="package")
def served(tiny, adapters):
    with running(tiny, adapters, capacity=512) as endpoint:
        yield endpoint
