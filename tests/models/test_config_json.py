"""Reading and writing config.json: both spellings of transformers, and any JSON at all."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.models.families import FAMILIES, WRAPPERS
from lorakit.models.rope import RopeConfig
from tests.models.config_files import LLAMA, LLAMA3, MISTRAL


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


@pytest.mark.parametrize("values", [[], "llama", None, 3, {}])
def test_config_of_the_wrong_type(values):
    with pytest.raises(lk.LorakitError, match=r"config\.json"):
        lk.ModelConfig.from_hf(values)


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


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
json_values = scalars | st.lists(scalars, max_size=3) | st.just({}) | st.just({"factor": 0})
KEYS = [*LLAMA, *lk.ModelConfig.from_hf(LLAMA | MISTRAL).to_hf(), "rope_parameters", "text_config"]
KEYS += ["num_local_experts", "num_experts", "decoder_sparse_step", "sliding_window_pattern"]
KEYS += ["rope_local_base_freq", "partial_rotary_factor", "hidden_activation", "mlp_only_layers"]
MODEL_TYPES = st.sampled_from([{"model_type": name} for name in [*FAMILIES, *WRAPPERS]])


@given(st.builds(dict.__or__, MODEL_TYPES, st.dictionaries(st.sampled_from(KEYS), json_values)))
def test_any_json_gives_a_config_or_one_clear_error(change):
    try:
        config = lk.ModelConfig.from_hf(LLAMA | change)
    except lk.LorakitError as error:
        assert "config.json" in str(error)
    else:
        assert config.head_dim > 0


GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_layer_config": [1]}, "per_layer_config must say the same of all its layers"),
        ({"per_layer_config": {"3": 5}}, "per_layer_config must say the same of all its layers"),
        (
            {"per_layer_config": {"2": {"head_dim": 32}, "3": {"head_dim": 64}}},
            "per_layer_config must say the same of all its layers",
        ),
        ({"per_layer_config": {"3": {"sliding_window": 5}}}, "per_layer_config names sliding_wind"),
        ({"global_head_dim": 33}, "global_head_dim must be even, not 33"),
        ({"global_head_dim": -2}, "global_head_dim must be positive, not -2"),
        ({"attention_k_eq_v": 1}, "attention_k_eq_v"),
        ({"num_global_key_value_heads": 3}, r"a multiple of num_global_key_value_heads \(3\)"),
        ({"num_kv_shared_layers": 4}, "leaves no layer whose keys"),
        ({"num_kv_shared_layers": 1}, "leaves no layer whose keys"),  # of its kind
        ({"hidden_size_per_layer_input": -1}, "hidden_size_per_layer_input must be 0 or more"),
        ({"vocab_size_per_layer_input": 7}, r"\(7\) must not be smaller than vocab_size"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is not supported"),
        ({"enable_moe_block": True}, "num_experts"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types must list"),
    ],
)
def test_a_bad_config_of_gemma_4(change, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.ModelConfig.from_hf(GEMMA4 | change)


def test_what_a_config_of_gemma_4_leaves_out():
    """The defaults of transformers; its own files say the sizes of full layers by their numbers."""
    config = lk.ModelConfig.from_hf(GEMMA4)
    assert [config.slides(i) for i in range(4)] == [True, True, True, False]  # the last is full
    assert [config.layer_head_dim(i) for i in (0, 3)] == [256, 512]
    assert config.rope_head_dims == [512, 256]
    said = {"head_dim": 64, "num_key_value_heads": 1}
    values = GEMMA4 | {"attention_k_eq_v": True, "per_layer_config": {"3": said}}
    other = lk.ModelConfig.from_hf(values)
    assert [(other.layer_head_dim(i), other.layer_kv_heads(i)) for i in (0, 3)] == [
        (256, 2),
        (64, 1),
    ]
    assert other.to_hf()["global_head_dim"] == 64
    unified = lk.ModelConfig.from_hf(GEMMA4 | {"model_type": "gemma4_unified_text"})
    assert unified.use_bidirectional_attention == "vision"
    assert unified.hidden_size_per_layer_input == 0
