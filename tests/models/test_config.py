"""Configs of models: both spellings of transformers, and one clear sentence for anything wrong."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.models.families import FAMILIES
from lorakit.models.rope import RopeConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": [128001, 128008, 128009],
}
MISTRAL = {"model_type": "mistral"}
MIXTRAL = {"model_type": "mixtral"}
QWEN3_MOE = {"model_type": "qwen3_moe"}
GEMMA2 = {"model_type": "gemma2"}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_both_spellings_of_rope_give_one_config():
    old = LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3}
    new = LLAMA | {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    config = lk.ModelConfig.from_hf(old)
    assert config == lk.ModelConfig.from_hf(new)
    assert config.rope.factor == 32
    assert config.head_dim == 64
    assert config.eos_token_ids == [128001, 128008, 128009]
    legacy = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}
    assert lk.ModelConfig.from_hf(legacy).rope.rope_type == "linear"


@pytest.mark.parametrize("rope", [{}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}])
def test_round_trip(rope):
    config = lk.ModelConfig.from_hf(LLAMA | rope)
    assert lk.ModelConfig.from_hf(config.to_hf()) == config


def test_transformers_reads_what_we_write():
    from transformers import LlamaConfig

    config = lk.ModelConfig.from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    theirs = LlamaConfig(**config.to_hf())
    assert theirs.head_dim == 64
    assert theirs.num_key_value_heads == 8
    assert lk.ModelConfig.from_hf(theirs.to_dict()) == config


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
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .gptq."),
        (
            {
                "model_type": "gemma3",
                "text_config": {},
                "quantization_config": {"quant_method": "awq"},
            },
            "already quantized .awq.",
        ),
    ],
)
def test_bad_model_config(change, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.ModelConfig.from_hf(LLAMA | change)


@pytest.mark.parametrize("values", [[], "llama", None, 3, {}])
def test_config_of_the_wrong_type(values):
    with pytest.raises(lk.LorakitError, match=r"config\.json"):
        lk.ModelConfig.from_hf(values)


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


@pytest.mark.parametrize(
    ("model_type", "change", "field", "expected"),
    [
        (
            "gemma3_text",
            {"sliding_window_pattern": None},
            "sliding_layers",
            ([True] * 5 + [False]) * 2,
        ),
        (
            "gemma3_text",
            {"_sliding_window_pattern": 3},
            "sliding_layers",
            ([True] * 5 + [False]) * 2,
        ),
        ("gemma2", {"sliding_window_pattern": 3}, "sliding_layers", [True, False] * 6),
        ("mixtral", {"rope_theta": None}, "rope", RopeConfig(1e6)),
        ("gemma3_text", {"rope_theta": None}, "rope", RopeConfig(1e6)),
        (
            "gemma3_text",
            {
                "rope_parameters": {"full_attention": {"rope_theta": 5e5}},
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "rope",
            RopeConfig(5e5, "linear", 8.0),
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}},
            "rope",
            RopeConfig(1e4, "linear", 2.0),
        ),
        ("llama", {"hidden_act": "silu", "hidden_activation": "gelu"}, "hidden_act", "silu"),
        ("gemma2", {"hidden_act": "gelu"}, "hidden_act", "gelu_pytorch_tanh"),
        (
            "qwen3",
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 12},
            "sliding_layers",
            [],
        ),
    ],
)
def test_odd_configs_are_read_as_transformers_reads_them(model_type, change, field, expected):
    values = LLAMA | {"model_type": model_type, "num_hidden_layers": 12} | change
    config = lk.ModelConfig.from_hf(values)
    assert dataclasses.asdict(config)[field] == (
        dataclasses.asdict(expected) if field == "rope" else expected
    )


def test_yarn_and_dynamic_reach_beyond_max_position_embeddings():
    def length(**rope):
        values = LLAMA | {"max_position_embeddings": 32768, "rope_scaling": rope}
        return lk.ModelConfig.from_hf(values).context_length

    original = {"original_max_position_embeddings": 32768}
    assert length(rope_type="yarn", factor=4.0, **original) == 131072  # Qwen2.5's way
    assert length(rope_type="dynamic", factor=2.0) == 65536
    assert length(rope_type="linear", factor=4.0) == 32768  # there it is the stretched length


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
json_values = scalars | st.lists(scalars, max_size=3) | st.just({}) | st.just({"factor": 0})


KEYS = [*LLAMA, *lk.ModelConfig.from_hf(LLAMA | MISTRAL).to_hf(), "rope_parameters", "text_config"]
KEYS += ["num_local_experts", "num_experts", "decoder_sparse_step", "sliding_window_pattern"]
KEYS += ["rope_local_base_freq", "partial_rotary_factor", "hidden_activation", "mlp_only_layers"]
MODEL_TYPES = st.sampled_from([{"model_type": name} for name in [*FAMILIES, "gemma3"]])


@given(st.builds(dict.__or__, MODEL_TYPES, st.dictionaries(st.sampled_from(KEYS), json_values)))
def test_any_json_gives_a_config_or_one_clear_error(change):
    try:
        config = lk.ModelConfig.from_hf(LLAMA | change)
    except lk.LorakitError as error:
        assert "config.json" in str(error)
    else:
        assert config.head_dim > 0


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
