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
    assert sliding("qwen2_moe", use_sliding_window=True, max_window_layers=3) == (
        [True, False, True] + [False] * 13
    )
    assert sliding("cwm") == [False, True, True, True] * 4
    assert sliding("olmo3") == [True, True, True, False] * 4
    assert sliding("smollm3", sliding_window=9) == []
    assert sliding("smollm3", sliding_window=9, use_sliding_window=True) == (
        [False, False, False, True] * 4
    )


def test_layers_without_a_rotary_embedding():
    def config(**change):
        return lk.ModelConfig.from_hf(LLAMA | {"model_type": "smollm3"} | change)

    assert config().rope_layers == [True, True, True, False] * 4
    assert config(no_rope_layer_interval=17).rope_layers == []
    assert config(no_rope_layers=[0] + [1] * 15).rope_layers == [False] + [True] * 15
    for bad, message in [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers names 2 of 16 layers"),
        ({"no_rope_layers": [2] * 16}, "no_rope_layers must list 0 or 1"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval must be positive"),
    ]:
        with pytest.raises(lk.LorakitError, match=message):
            config(**bad)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_keys_that_a_file_leaves_out_mean_what_transformers_takes(model_type):
    """All of them at once, but for the sizes in SIZES, which published files always carry."""
    from transformers import AutoConfig

    whole = AutoConfig.for_model(model_type, num_hidden_layers=6).to_dict()
    found = {name: whole[name] for name in ("model_type", *SIZES) if name in whole}
    assert same(lk.ModelConfig.from_hf(found), lk.ModelConfig.from_hf(whole))


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
SIZES += ["num_attention_heads"]


def same(a, b):
    """Compare two configurations; without sliding layers the size of the window means nothing."""
    windows = [[c.window(i) for i in range(c.num_hidden_layers)] for c in (a, b)]
    a, b = (dataclasses.replace(c, sliding_window=9) for c in (a, b))
    return a == b and windows[0] == windows[1]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("scaled", [False, True])
def test_each_key_that_a_file_leaves_out_means_what_transformers_takes(model_type, scaled):
    """Every key of transformers' class in turn, the others with values that are no defaults."""
    from transformers import AutoConfig

    unusual = {
        "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 600, "num_hidden_layers": 6,
        "num_attention_heads": 64, "num_key_value_heads": 2, "head_dim": 10,
        "max_position_embeddings": 300, "rms_norm_eps": 1e-3, "bos_token_id": 7,
        "eos_token_id": [8, 9], "pad_token_id": 6, "hidden_act": "gelu",
        "hidden_activation": "gelu", "sliding_window": 5, "use_sliding_window": True,
        "max_window_layers": 3, "query_pre_attn_scalar": 3, "final_logit_softcapping": 1.0,
        "attn_logit_softcapping": 2.0, "num_local_experts": 12, "num_experts_per_tok": 3,
        "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 2,
        "mlp_only_layers": [1], "shared_expert_intermediate_size": 40, "qkv_bias": False,
        "attention_bias": False, "attention_out_bias": True, "mlp_bias": True,
        "embedding_multiplier": 2.0, "residual_multiplier": 3.0, "logits_scaling": 4.0,
        "attention_multiplier": 5.0, "no_rope_layers": [1, 0, 1, 1, 0, 1],
        "no_rope_layer_interval": 2,
    }  # fmt: skip
    known = AutoConfig.for_model(model_type).to_dict().keys() - {"model_type"}
    values = {name: value for name, value in unusual.items() if name in known}
    if scaled and model_type not in ("gemma3_text", "olmo3", "phi3"):  # two rotations; longrope
        values["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 3e4, "factor": 2.0}
    for left_out in known:
        given = {name: value for name, value in values.items() if name != left_out}
        file = {"model_type": model_type} | given
        if left_out in SIZES and left_out not in FAMILIES[model_type].defaults:
            with pytest.raises(lk.LorakitError, match=f"{left_out} is missing"):
                lk.ModelConfig.from_hf(file)
            continue
        theirs = AutoConfig.for_model(model_type, **given).to_dict()
        assert same(lk.ModelConfig.from_hf(file), lk.ModelConfig.from_hf(theirs)), left_out
    nothing = {"num_key_value_heads": None} | {n: v for n, v in values.items() if "key" not in n}
    assert lk.ModelConfig.from_hf({"model_type": model_type} | nothing).num_key_value_heads == 64


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_architecture_is_transformers_class(model_type):
    from transformers.models.auto import modeling_auto as known

    names = known.MODEL_MAPPING_NAMES | known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert FAMILIES[model_type].architecture == names[model_type]
