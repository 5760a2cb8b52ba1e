"""The families: spellings, defaults and sliding layers."""

import dataclasses

import pytest

import lorakit as lk
from lorakit.models.families import FAMILIES
from tests.models.config_files import LLAMA


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"model_type": "gemma2"}, {"layer_types": ["sliding_attention", "full_attention"] * 8}),
        (
            {
                "model_type": "gemma3_text",
                "rope_theta": 5e5,
                "rope_local_base_freq": 2e4,
                "rope_scaling": {"type": "linear", "factor": 8.0},
                "sliding_window_pattern": 4,
            },
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
                },
                "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 4,
            },
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 9, "torch_dtype": "bfloat16"},
            {"num_local_experts": 9, "dtype": "bfloat16"},
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 14,
            },
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention"] * 14 + ["sliding_attention"] * 2,
            },
        ),
        (
            {"model_type": "gemma", "hidden_act": "gelu"},
            {"hidden_activation": "gelu_pytorch_tanh"},
        ),
    ],
    ids=["gemma2", "gemma3", "qwen3_moe", "qwen2", "gemma"],
)
def test_both_spellings_of_the_families(old, new):
    sizes = {name: value for name, value in LLAMA.items() if name != "model_type"}
    config = lk.ModelConfig.from_hf(sizes | old)
    assert lk.ModelConfig.from_hf(sizes | {"model_type": old["model_type"]} | new) == config
    assert lk.ModelConfig.from_hf(config.to_hf()) == config


def test_sliding_layers_of_each_family():
    def sliding(model_type, **change):
        return lk.ModelConfig.from_hf(LLAMA | {"model_type": model_type} | change).sliding_layers

    assert sliding("llama") == []
    assert sliding("llama", sliding_window=4096) == []  # transformers' Llama has no such key
    assert sliding("qwen2", sliding_window=32) == []  # use_sliding_window is false unless said
    assert sliding("mistral") == [True] * 16  # v0.1 leaves sliding_window out: 4096
    assert sliding("mistral", sliding_window=None) == []
    qwen = {"sliding_window": 32768, "max_window_layers": 12}
    assert sliding("qwen2", use_sliding_window=False, **qwen) == []
    assert sliding("qwen2", use_sliding_window=True, **qwen) == [False] * 12 + [True] * 4
    assert sliding("qwen3", use_sliding_window=True, sliding_window=9, max_window_layers=99) == []


@pytest.mark.parametrize("model_type", FAMILIES)
def test_keys_that_a_file_leaves_out_mean_what_transformers_takes(model_type):
    """The keys in `kept` are given, because published files always carry them."""
    from transformers import AutoConfig

    whole = AutoConfig.for_model(model_type, num_hidden_layers=6).to_dict()
    kept = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    kept += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
    kept += ["bos_token_id", "eos_token_id", "pad_token_id"]
    expected = lk.ModelConfig.from_hf(whole)
    found = lk.ModelConfig.from_hf({name: whole[name] for name in kept})
    windows = [[config.window(i) for i in range(6)] for config in (found, expected)]
    assert windows[0] == windows[1]
    # without sliding layers the size of the window means nothing
    found, expected = (dataclasses.replace(c, sliding_window=9) for c in (found, expected))
    assert found == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_architecture_is_transformers_class(model_type):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert FAMILIES[model_type].architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
