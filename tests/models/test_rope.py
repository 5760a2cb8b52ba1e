"""Rotary frequencies and tables against transformers."""

import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.models.rope import (
    NO_ROPE,
    RopeConfig,
    inverse_frequencies,
    llama3_of_divisors,
    query_scale,
    rope_tables,
)
from tests.conftest import (
    FAMILY_VARIANTS,
    LLAMA3_ROPE,
    LOGITS,
    TINY,
    TINY_VARIANTS,
    tiny_llama,
)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        LLAMA3_ROPE,
        {
            **LLAMA3_ROPE,
            "original_max_position_embeddings": 8192,
            "rope_theta": 5e5,
            "factor": 32.0,
        },
    ],
)
def test_rotary_frequencies(rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=dict(rope))
    expected = LlamaRotaryEmbedding(config).inv_freq
    ours = inverse_frequencies(RopeConfig(**rope), 64, torch.device("cpu"))
    assert torch.allclose(ours, expected, rtol=1e-6)  # fp32, one or two roundings apart


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
        {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9}},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 3,
                "truncate": False,
                "mscale": 0.7,
                "mscale_all_dim": 0.5,
            }
        },
        {
            "original_max_position_embeddings": 16,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.0, 1.5, 2.0],
                "long_factor": [1.0, 2.0, 3.0, 5.0],
            },
        },
        {"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_theta": 1e3, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {
            "rope_theta": 1e4,
            "rope_parameters": {"rope_type": "default"},
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        {
            "rope_theta": 1e4,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
    ],
)
def test_every_spelling_of_rope_is_read_as_transformers_reads_it(tmp_path, change):
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(60)[None]
    ours = lk.load_model(tmp_path, dtype="float32")
    assert (ours(ids) - theirs(ids).logits).abs().max() <= LOGITS


def test_proportional_frequencies_and_none():
    """The pairs of Gemma 4 are those of the whole head, of which the last do not turn."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=dict(rope))
    expected, _ = ROPE_INIT_FUNCTIONS["proportional"](config)
    cpu = torch.device("cpu")
    found = inverse_frequencies(RopeConfig(**rope), 64, cpu)
    assert torch.allclose(found, expected, rtol=1e-6)  # fp32, one or two roundings apart
    assert (found == 0).sum() == 24
    assert torch.equal(inverse_frequencies(NO_ROPE, 64, cpu), torch.zeros(32))


@pytest.mark.parametrize("length", [10, 200])
def test_partial_longrope_of_phi(length):
    """Its tables are transformers', below and beyond the original context of 128."""
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    theirs = Phi3Config(**{**TINY, **FAMILY_VARIANTS["phi3"][1]})
    positions = torch.arange(length)[None]
    expected = Phi3RotaryEmbedding(theirs)(torch.zeros(1), positions)
    ours = lk.ModelConfig.from_hf(theirs.to_dict())
    for table, both_halves in zip(
        rope_tables(ours.rope, ours.head_dim, positions), expected, strict=True
    ):
        # angles up to 200 in fp32: 200 * 2^-24, from frequencies one or two roundings apart
        assert (table - both_halves[..., :2]).abs().max() <= 4e-5


def test_scale_of_queries():
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    rope = RopeConfig(original_max_position_embeddings=16, llama_4_scaling_beta=0.1)
    positions = torch.stack([torch.arange(100), torch.arange(100).clamp(max=40)])
    expected = get_llama_4_attn_scale(positions, 0.1, 16)  # [B, 1, T, 1]
    # fp32, a rounding or two apart
    assert torch.allclose(query_scale(rope, positions, 100), expected.transpose(1, 2), rtol=1e-6)
    assert query_scale(rope, positions, 16) is None  # all are 1
    assert query_scale(RopeConfig(), positions, 10**6) is None


@pytest.mark.parametrize("length", [10, 60])
@pytest.mark.parametrize("variant", [name for name in TINY_VARIANTS if "rope" in name])
def test_tables_are_transformers_cos_and_sin(variant, length):
    """The lengths are below and beyond the context that the model was trained on."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig(**{**TINY, **TINY_VARIANTS[variant]})
    positions = torch.arange(length)[None]
    expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions)
    ours = lk.ModelConfig.from_hf(theirs.to_dict())
    found = rope_tables(ours.rope, ours.head_dim, positions)
    for table, both_halves in zip(found, expected, strict=True):
        # angles up to 60 in fp32: 60 * 2^-24, from frequencies one or two roundings apart
        assert (table - both_halves[..., : ours.head_dim // 2]).abs().max() <= 2e-5
    assert ours.rope.rope_type == variant.removesuffix("_rope")


@pytest.mark.parametrize("variant", ["dynamic_rope", "longrope"])
def test_each_row_has_the_tables_of_its_own_length(variant):
    """A row of padded positions, and a document of a packed one, turn as transformers turns it."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig(**{**TINY, **TINY_VARIANTS[variant]})
    ours = lk.ModelConfig.from_hf(theirs.to_dict())
    half, lengths = ours.head_dim // 2, [10, 60, 24, 25]
    alone = [LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(n)[None]) for n in lengths]
    rows = torch.stack([torch.arange(60).clamp(max=n - 1) for n in lengths])
    padded = rope_tables(ours.rope, ours.head_dim, rows)
    packed = torch.cat([torch.arange(n) for n in lengths])[None]
    own = torch.cat([torch.full((n,), n) for n in lengths])[None]
    cut = [table[0].split(lengths) for table in rope_tables(ours.rope, ours.head_dim, packed, own)]
    for i, n in enumerate(lengths):
        for part in (0, 1):  # cos, sin
            expected = alone[i][part][0, :, :half]
            for table in (padded[part][i, :n], cut[part][i]):
                # angles up to 60 in fp32: 60 * 2^-24, from frequencies a few roundings apart
                assert (table - expected).abs().max() <= 2e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "mrope"}, "rope_type 'mrope' is not supported"),
        ({"factor": 0.0}, "rope_theta and factor must be positive"),
        ({"high_freq_factor": 1.0}, "high_freq_factor must exceed low_freq_factor"),
        ({"original_max_position_embeddings": 1}, "must be at least 2"),
        ({"beta_slow": 0.0}, "beta_fast, beta_slow must be > 0"),
        ({"rope_type": "yarn", "rope_theta": 1.0}, "yarn needs a rope_theta above 1"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor must lie between 0 and 1"),
        ({"long_factor": [1.0, 0.0]}, "short_factor and long_factor must be positive"),
    ],
)
def test_settings_that_no_rotation_has(settings, message):
    with pytest.raises(lk.LorakitError, match=message):
        RopeConfig(**settings)


CPU = torch.device("cpu")


def divided_by(rope, head_dim):
    """The fp32 numbers that divide the frequencies, as a GGUF file holds them."""
    plain = inverse_frequencies(RopeConfig(rope_theta=rope.rope_theta), head_dim, CPU)
    return (plain / inverse_frequencies(rope, head_dim, CPU)).float()


@given(
    length=st.integers(64, 131072),
    high=st.integers(2, 16),
    factor=st.sampled_from([2.0, 8.0, 32.0]),
    theta=st.sampled_from([1e4, 5e5]),
    head_dim=st.sampled_from([16, 64, 128]),
)
def test_divisors_tell_the_scaling_that_they_are_of(length, high, factor, theta, head_dim):
    """The frequencies come back, and L and h too where more than two are blended."""
    rope = RopeConfig(theta, "llama3", factor, length, high_freq_factor=float(high))
    divisors = divided_by(rope, head_dim)
    share = (1 / divisors.double() - 1 / factor) / (1 - 1 / factor)
    blended = int(((share > 1e-4) & (share < 1 - 1e-4)).sum())
    assume(divisors.max() > 0.9999 * factor)  # else no divisor is the factor
    assume(blended != 1 or high == 4)  # which is then assumed
    found = llama3_of_divisors(divisors, theta)
    expected = inverse_frequencies(rope, head_dim, CPU)
    assert torch.allclose(inverse_frequencies(found, head_dim, CPU), expected, rtol=1e-4, atol=0)
    if blended > 2:
        assert found.original_max_position_embeddings == pytest.approx(length, rel=1e-4)
        assert found.high_freq_factor == pytest.approx(high, rel=1e-3)


def test_published_scalings_are_read_as_they_are():
    for length, factor in ((8192, 8.0), (8192, 32.0), (4096, 8.0)):
        rope = RopeConfig(5e5, "llama3", factor, length)
        assert llama3_of_divisors(divided_by(rope, 128), 5e5) == rope


@given(st.lists(st.floats(width=32), min_size=4, max_size=4))
def test_any_divisors_are_a_scaling_or_none(values):
    """A scaling that is found has the divisors."""
    divisors = torch.tensor(values, dtype=torch.float32)
    found = llama3_of_divisors(divisors, 1e4)
    if found is not None:
        assert torch.allclose(divided_by(found, 8), divisors, rtol=1e-3)
