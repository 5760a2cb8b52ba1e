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
