"""Adapter files of tied models and of heads that a model lacks, wrong paths and wrong types."""

import copy

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from tests.adapters.common import CLOSE, SHORT_IDS, filled
from tests.conftest import tiny


def test_a_file_of_an_embedding_that_was_not_tied(tmp_path):
    """PEFT ties nothing in GPT-2, whatever ensure_weight_tying says; here both would change."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    options = {"r": 2, "target_modules": ["wte", "c_fc"], "fan_in_fan_out": True}
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(ensure_weight_tying=True, **options)
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(lk.LorakitError, match="wte is adapted, and lm_head, which has its weight"):
        lk.load_adapter(model, tmp_path)
    assert not lk.adapter_names(model)


def test_the_classifier_that_peft_names_and_a_model_has_not(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    plain = LlamaForSequenceClassification(config).eval()
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options)).eval()
    filled(theirs).save_pretrained(tmp_path)
    ours = lk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(ours(SHORT_IDS).logits, theirs(SHORT_IDS).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["olora", "pissa"])
def test_a_start_that_was_taken_out_of_the_head(kind, tmp_path):
    """PEFT adds the head's weight without it to the file."""
    options = {"r": 4, "target_modules": ["lm_head", "q_proj"], "init_lora_weights": kind}
    plain = tiny("llama", tie_word_embeddings=False)
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options)).eval()
    filled(theirs).save_pretrained(tmp_path)
    ours = lk.load_adapter(plain, tmp_path)
    # the start is a decomposition in fp32, made twice
    assert (ours(SHORT_IDS).logits - theirs(SHORT_IDS).logits).abs().max() < 1e-3


def test_paths_of_another_kind(tmp_path):
    module = nn.Sequential(nn.Linear(8, 8))
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(lk.LorakitError, match="adapter_config.json is no file"):
        lk.load_adapter(module, tmp_path)
    lk.attach(module, lk.LoraConfig(r=2))
    (tmp_path / "file").touch()
    with pytest.raises(lk.LorakitError, match="file is a file; a directory is wanted"):
        lk.save_adapter(module, tmp_path / "file")
    lk.save_adapter(module, tmp_path / "bin")
    (tmp_path / "bin" / "adapter_model.safetensors").rename(tmp_path / "bin" / "adapter_model.bin")
    with pytest.raises(lk.LorakitError, match="is pickled, which is not read"):
        lk.load_adapter(nn.Sequential(nn.Linear(8, 8)), tmp_path / "bin")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_tensors_that_are_no_weights(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    lk.save_adapter(lk.attach(nn.Sequential(nn.Linear(8, 8)), lk.LoraConfig(r=2)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(path).items()}, path)
    module = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(lk.LorakitError, match=r"lora_A\.weight is of torch\."):
        lk.load_adapter(module, tmp_path)
    assert not lk.adapter_names(module)
