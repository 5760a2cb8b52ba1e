"""What the tests of models share: a multimodal model and a tokenizer on disk."""

import pytest
import torch

from tests.conftest import GEMMA3, TINY, write_tokenizer


@pytest.fixture(scope="session")
def multimodal(tmp_path_factory):
    """A tiny Gemma 3 with a vision tower, as transformers saves it."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config={**TINY, **GEMMA3}, vision_config=vision, image_token_index=96
    )
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    path = tmp_path_factory.mktemp("multimodal")
    model.save_pretrained(path)
    return path, model


@pytest.fixture
def directory(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path
