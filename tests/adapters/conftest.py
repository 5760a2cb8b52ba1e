"""Fixtures that tests of adapters share."""

import copy

import pytest
import torch

import lorakit as lk
from tests.adapters.parity import BASES
from tests.conftest import tiny


@pytest.fixture
def model(tiny_dir):
    return lk.load_model(tiny_dir, dtype="float32")


@pytest.fixture(params=["dense", "nf4"])
def either(tiny_dir, request):
    quantize = None if request.param == "dense" else "nf4"
    return lk.load_model(tiny_dir, dtype="float32", quantize=quantize)


@pytest.fixture(scope="module")
def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """bases(name): a directory, transformers' model and ours of the same weights, both fresh."""
    from transformers import AutoModelForCausalLM

    known = {}

    def fresh(name):
        if name not in known:
            path = tmp_path_factory.mktemp("base")
            family, overrides = BASES[name]
            tiny(family, **overrides).save_pretrained(path)
            theirs = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            )
            known[name] = path, theirs.eval(), lk.load_model(path, dtype="float32")
        path, *models = known[name]
        return path, *map(copy.deepcopy, models)

    return fresh
