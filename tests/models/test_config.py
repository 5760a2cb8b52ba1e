"""ModelConfig: what it refuses, in one clear sentence, and what follows from its fields."""

import dataclasses

import pytest

import lorakit as lk
from tests.models.config_files import GEMMA2, LLAMA, MISTRAL, MIXTRAL, QWEN3_MOE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not supported.*did you mean 'llama'"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"hidden_size": "2048"}, "hidden_size must be int, not '2048'"),
        ({"hidden_size": True}, "hidden_size must be int, not True"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be int, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive"),
        ({"num_key_value_heads": 5}, r"num_attention_heads \(32\) must be a multiple"),
        ({"hidden_size": 2049}, "hidden_size .2049. is no multiple of num_attention_heads"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "rope_type 'mrope' is not supp"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor and long_factor hold 0 and 0"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 32}},
            "hold 32 and 0 numbers, not head_dim / 2 = 32",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1}, "above 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"model_type": "llava"}, "model_type 'llava' is not supported"),
        ({"model_type": "siglip_vision_model"}, "model_type 'siglip_vision_model' is not supp"),
        ({"model_type": "gemma3"}, "model_type 'gemma3' without a text_config"),
        ({"model_type": ["llama"]}, "model_type .'llama'. is not supported"),
        (
            {"model_type": "mistral3", "text_config": {"model_type": "mistral4"}},
            "model_type 'mistral4', the text model of 'mistral3', is not supported; supported are",
        ),
        (MIXTRAL | {"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must lie between 1 and"),
        (MIXTRAL | {"num_local_experts": 0}, "must lie between 1 and the number of experts .0."),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step must be positive"),
        (QWEN3_MOE | {"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
        (GEMMA2 | {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping must be positive"),
        (
            {"model_type": "gemma3_text", "sliding_window_pattern": 0},
            "sliding_window_pattern must be a positive",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be float"),
        ({"rope_scaling": 3}, "rope parameters must be a mapping"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs a factor"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type 'dynamic' needs a factor"),
        (
            MISTRAL | {"layer_types": ["sliding"] * 16},
            "layer_types must list full_attention or sliding",
        ),
        (MISTRAL | {"layer_types": ["sliding_attention"] * 15}, "names 15 of 16 layers"),
        (
            MISTRAL | {"layer_types": ["sliding_attention"] * 16, "sliding_window": None},
            "sliding_window is missing",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be positive"),
        ({"quantization_config": {"load_in_4bit": True}}, "already quantized"),
        ({"quantization_config": {"quant_method": "hqq"}}, "already quantized .hqq."),
        (
            {
                "model_type": "gemma3",
                "text_config": {},
                "quantization_config": {"quant_method": "aqlm"},
            },
            "already quantized .aqlm.",
        ),
    ],
)
def test_bad_model_config(change, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.ModelConfig.from_hf(LLAMA | change)


@pytest.mark.parametrize("model_type", ["gemma3n", "llama4"])
def test_a_model_type_is_looked_at_before_anything_else(model_type):
    """A model that lorakit lacks is refused by its name, whatever else its file lacks."""
    values = {"model_type": model_type, "text_config": {"model_type": f"{model_type}_text"}}
    with pytest.raises(lk.LorakitError, match=f"^config.json: model_type '{model_type}' is not su"):
        lk.ModelConfig.from_hf(values)


def test_yarn_and_dynamic_reach_beyond_max_position_embeddings():
    def length(**rope):
        values = LLAMA | {"max_position_embeddings": 32768, "rope_scaling": rope}
        return lk.ModelConfig.from_hf(values).context_length

    original = {"original_max_position_embeddings": 32768}
    assert length(rope_type="yarn", factor=4.0, **original) == 131072  # Qwen2.5's way
    assert length(rope_type="dynamic", factor=2.0) == 65536
    assert length(rope_type="linear", factor=4.0) == 32768  # there it is the stretched length


def test_layers_differ_by_window_and_experts():
    config = lk.ModelConfig(
        "qwen3_moe", 9, 8, 8, 3, 2, 1, 4,
        sliding_window=5, sliding_layers=[True, False, True],
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        moe_layers=[False, True, False],
    )  # fmt: skip
    assert [config.window(i) for i in range(3)] == [5, None, 5]
    assert [config.has_experts(i) for i in range(3)] == [False, True, False]
    plain = lk.ModelConfig("llama", 9, 8, 8, 3, 2, 1, 4)
    assert not any(plain.slides(i) or plain.has_experts(i) for i in range(3))
    assert plain.attention_scale == 0.5
    assert dataclasses.replace(plain, query_pre_attn_scalar=16.0).attention_scale == 0.25


@pytest.mark.parametrize(("given", "ids"), [(None, []), (3, [3]), ([3, 4], [3, 4])])
def test_end_tokens_are_a_list(given, ids):
    config = lk.ModelConfig("llama", 9, 8, 8, 3, 2, 1, 4, eos_token_id=given)
    assert config.eos_token_ids == ids
