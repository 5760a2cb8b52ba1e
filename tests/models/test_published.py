"""The config.json of published models, as their repositories have it (keys that matter), against
the number of parameters that their pages state, and against transformers' reading of the same.
"""

import json
import re

import pytest
import torch

import lorakit as lk
from lorakit.models.decoder import Decoder
from lorakit.models.per_layer import host_tables
from lorakit.models.rope import inverse_frequencies


def sizes(vocab, hidden, inner, layers, heads, kv_heads, **more):
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
LLAMA31 = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 131072}
LLAMA32 = LLAMA31 | {"rope_scaling": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True}
QWEN2 = {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "sliding_window": 32768}
QWEN2 |= {"use_sliding_window": False, "max_window_layers": 21, "max_position_embeddings": 32768}
QWEN3 = {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 128, "attention_bias": False}
GEMMA = {"model_type": "gemma", "hidden_act": "gelu", "head_dim": 256, "rope_theta": 1e4}
GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
}
MISTRAL = {"model_type": "mistral", "rms_norm_eps": 1e-5}
PHI = {"model_type": "phi3", "rms_norm_eps": 1e-5, "pad_token_id": None}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 48,
    "long_factor": [1 + 0.5 * i for i in range(48)],
}
GRANITE = {
    "model_type": "granite",
    "rope_theta": 1e7,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.015625,
    "tie_word_embeddings": True,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "attention_bias": True,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "initial_context_length": 4096,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 4,
    "experts_per_token": 4,
    "sliding_window": 128,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "quantization_config": {"quant_method": "mxfp4"},
}

PUBLISHED = {
    "Llama 2 7B": (LLAMA | sizes(32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "Code Llama 7B": (
        LLAMA | {"rope_theta": 1e6} | sizes(32016, 4096, 11008, 32, 32, 32),
        6_738_546_688,
    ),
    "Llama 3 8B": (
        LLAMA | {"rope_theta": 5e5} | sizes(128256, 4096, 14336, 32, 32, 8),
        8_030_261_248,
    ),
    "Llama 3.1 8B": (LLAMA31 | sizes(128256, 4096, 14336, 32, 32, 8), 8_030_261_248),
    "Llama 3.2 1B": (LLAMA32 | sizes(128256, 2048, 8192, 16, 32, 8), 1_235_814_400),
    "Llama 3.2 3B": (LLAMA32 | sizes(128256, 3072, 8192, 28, 24, 8), 3_212_749_824),
    "Llama 3.3 70B": (LLAMA31 | sizes(128256, 8192, 28672, 80, 64, 8), 70_553_706_496),
    "SmolLM2 135M": (
        LLAMA | {"rope_theta": 1e5} | sizes(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
        134_515_008,
    ),
    "Qwen2.5 0.5B": (
        QWEN2 | sizes(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen2.5 7B": (QWEN2 | sizes(152064, 3584, 18944, 28, 28, 4), 7_615_616_512),
    "Qwen3 0.6B": (
        QWEN3 | sizes(151936, 1024, 3072, 28, 16, 8, tie_word_embeddings=True),
        596_049_920,
    ),
    "Qwen3 8B": (QWEN3 | sizes(151936, 4096, 12288, 36, 32, 8), 8_190_735_360),
    "Qwen3 30B A3B": (
        QWEN3
        | {
            "model_type": "qwen3_moe",
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        | sizes(151936, 2048, 6144, 48, 32, 4),
        30_532_122_624,
    ),
    "Gemma 2B": (GEMMA | sizes(256000, 2048, 16384, 18, 8, 1), 2_506_172_416),
    "Gemma 7B": (GEMMA | sizes(256000, 3072, 24576, 28, 16, 16), 8_537_680_896),
    "Gemma 2 2B": (
        GEMMA2 | sizes(256000, 2304, 9216, 26, 8, 4, query_pre_attn_scalar=256),
        2_614_341_888,
    ),
    "Gemma 2 9B": (
        GEMMA2 | sizes(256000, 3584, 14336, 42, 16, 8, query_pre_attn_scalar=256),
        9_241_705_984,
    ),
    "Gemma 2 27B": (
        GEMMA2
        | sizes(256000, 4608, 36864, 46, 32, 16, query_pre_attn_scalar=144)
        | {"head_dim": 128},
        27_227_128_320,
    ),
    "Gemma 3 1B": (
        GEMMA3 | sizes(262144, 1152, 6912, 26, 4, 1, sliding_window=512),
        999_885_952,
    ),
    "Mistral 7B v0.1": (
        MISTRAL | sizes(32000, 4096, 14336, 32, 32, 8, sliding_window=4096),
        7_241_732_096,
    ),
    "Mistral 7B v0.2": (
        MISTRAL | {"rope_theta": 1e6} | sizes(32000, 4096, 14336, 32, 32, 8, sliding_window=None),
        7_241_732_096,
    ),
    "Mistral 7B v0.3": (
        MISTRAL | {"rope_theta": 1e6} | sizes(32768, 4096, 14336, 32, 32, 8, sliding_window=None),
        7_248_023_552,
    ),
    "Mixtral 8x7B": (
        {"model_type": "mixtral", "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None}
        | {"num_local_experts": 8, "num_experts_per_tok": 2}
        | sizes(32000, 4096, 14336, 32, 32, 8),
        46_702_792_704,
    ),
    "Mistral Small 3.1, its text model": (
        MISTRAL
        | {"rope_theta": 1e9, "head_dim": 128}
        | sizes(131072, 5120, 32768, 40, 32, 8, sliding_window=None),
        23_572_403_200,
    ),
    "Ministral 8B": (
        {"model_type": "ministral", "rope_theta": 1e8, "head_dim": 128, "rms_norm_eps": 1e-5}
        | sizes(131072, 4096, 12288, 36, 32, 8, sliding_window=32768),
        8_019_808_256,
    ),
    "SmolLM3 3B": (
        {"model_type": "smollm3", "rope_theta": 5e6, "no_rope_layer_interval": 4}
        | sizes(128256, 2048, 11008, 36, 16, 4, max_position_embeddings=65536),
        3_075_098_624,
    ),
    "Phi 3 mini": (PHI | sizes(32064, 3072, 8192, 32, 32, 32), 3_821_079_552),
    "Phi 4": (
        PHI | sizes(100352, 5120, 17920, 40, 40, 10, rope_theta=250000.0),
        14_659_507_200,
    ),
    "Phi 4 mini": (
        PHI
        | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}
        | {"max_position_embeddings": 131072, "rope_scaling": LONGROPE}
        | sizes(200064, 3072, 8192, 32, 24, 8),
        3_836_021_760,
    ),
    "Granite 3.3 2B": (GRANITE | sizes(49159, 2048, 8192, 40, 32, 8), 2_533_539_840),
    "OLMo 2 7B": (
        {"model_type": "olmo2", "rope_theta": 5e5, "rms_norm_eps": 1e-6}
        | sizes(100352, 4096, 11008, 32, 32, 32),
        7_298_617_344,
    ),
    "OLMo 3 7B": (
        {"model_type": "olmo3", "rope_theta": 5e5, "rms_norm_eps": 1e-6, "rope_scaling": YARN}
        | sizes(100278, 4096, 11008, 32, 32, 32, sliding_window=4096),
        7_298_011_136,
    ),
    "Qwen1.5 MoE A2.7B": (
        {"model_type": "qwen2_moe", "rope_theta": 1e6} | sizes(151936, 2048, 5632, 24, 16, 16),
        14_315_784_192,
    ),
    "gpt-oss 20B": (
        GPT_OSS | sizes(201088, 2880, 2880, 24, 64, 8, num_local_experts=32),
        20_914_757_184,
    ),
    "Seed OSS 36B": (
        {"model_type": "seed_oss", "rope_theta": 1e7, "head_dim": 128}
        | sizes(155136, 5120, 27648, 64, 80, 8),
        36_151_104_512,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    values, count = PUBLISHED[name]
    with torch.device("meta"):
        model = Decoder(lk.ModelConfig.from_hf(values))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("stated", "values"),
    [
        (34, sizes(131072, 3072, 9216, 26, 32, 8, tie_word_embeddings=True)),
        (84, sizes(131072, 4096, 14336, 34, 32, 8)),
        (135, sizes(131072, 5120, 16384, 40, 32, 8)),
    ],
)
def test_number_of_parameters_of_ministral_3(stated, values):
    """Its pages state the text models' sizes in tenths of a billion, cut off."""
    with torch.device("meta"):
        model = Decoder(lk.ModelConfig.from_hf({"model_type": "ministral3"} | values))
    assert sum(p.numel() for p in model.parameters()) // 10**8 == stated


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_the_same(name, tmp_path):
    """Parameters, rotary frequencies, attention scale, windows and caps, as transformers' modules
    hold them; and again from the config.json that lorakit writes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values, count = PUBLISHED[name]
    config = lk.ModelConfig.from_hf(values)
    for content in (values, config.to_hf()):
        (tmp_path / "config.json").write_text(json.dumps(content))
        theirs = AutoConfig.from_pretrained(tmp_path)
        slides = [config.slides(i) for i in range(config.num_hidden_layers)]
        theirs.num_hidden_layers = 1  # the modules of one layer say it all
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(theirs)
        model = whole.model
        in_a_layer = sum(p.numel() for p in model.layers[0].parameters())
        outside = sum(p.numel() for p in whole.parameters()) - in_a_layer
        assert outside + config.num_hidden_layers * in_a_layer == count
        scale = config.attention_multiplier
        if scale is None:
            scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        assert model.layers[0].self_attn.scaling == pytest.approx(scale)
        kinds = {"full_attention": config.rope, "sliding_attention": config.rope_local}
        rope = type(model.rotary_emb)(theirs)
        found = {kind: rope for kind, rope in kinds.items() if rope is not None}
        for kind, ours in found.items():
            freqs = rope.inv_freq if len(found) == 1 else getattr(rope, f"{kind}_inv_freq")
            mine = inverse_frequencies(ours, config.head_dim, torch.device("cpu"))
            assert torch.allclose(mine, freqs, rtol=1e-6)
        if config.model_type.startswith("gemma") and any(slides):
            kinds = [kind == "sliding_attention" for kind in theirs.layer_types]
            assert kinds == slides
        if any(slides):
            assert theirs.sliding_window == config.sliding_window
        if config.model_type == "gemma2":
            assert theirs.attn_logit_softcapping == config.attn_logit_softcapping == 50
            assert theirs.final_logit_softcapping == config.final_logit_softcapping == 30
        assert theirs.tie_word_embeddings == config.tie_word_embeddings
        assert theirs.rms_norm_eps == config.rms_norm_eps


def test_a_published_gemma_3_config_leaves_most_fields_out():
    """What the repository of gemma-3-4b-it says of its text model; the rest are defaults."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    values = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    config = lk.ModelConfig.from_hf(values)
    assert (config.vocab_size, config.head_dim, config.num_key_value_heads) == (262208, 256, 4)
    assert (config.rope.rope_theta, config.rope.factor) == (1e6, 8.0)
    assert (config.rope_local.rope_theta, config.rope_local.factor) == (1e4, 1.0)
    assert config.query_pre_attn_scalar == 256
    assert [config.slides(i) for i in range(7)] == [True] * 5 + [False, True]
    assert config.eos_token_ids == [1, 106]


GEMMA4 = {"model_type": "gemma4_text", "final_logit_softcapping": 30.0, "num_experts": None}
GEMMA4_SMALL = GEMMA4 | {"hidden_size_per_layer_input": 256, "sliding_window": 512}
GEMMA4_LARGE = GEMMA4 | {"hidden_size_per_layer_input": 0, "sliding_window": 1024}
GEMMA4_LARGE |= {"attention_k_eq_v": True, "use_bidirectional_attention": "vision"}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8}
FOUR_TO_ONE = ["sliding_attention"] * 4 + ["full_attention"]
# Sizes: gemma/gm/nn/gemma4/_gemma4.py of google-deepmind/gemma; of 12B, its repository's file.
GEMMA4_MODELS = {
    "E2B": (
        GEMMA4_SMALL
        | {"num_kv_shared_layers": 20, "use_double_wide_mlp": True, "layer_types": FOUR_TO_ONE * 7}
        | sizes(262144, 1536, 6144, 35, 8, 1),
        4_628_569_379,
    ),
    "E4B": (
        GEMMA4_SMALL | {"num_kv_shared_layers": 18} | sizes(262144, 2560, 10240, 42, 8, 2),
        7_463_013_418,
    ),
    "12B": (
        GEMMA4_LARGE
        | {"model_type": "gemma4_unified_text"}
        | sizes(262144, 3840, 15360, 48, 16, 8, num_global_key_value_heads=1),
        11_907_350_320,
    ),
    "31B": (
        GEMMA4_LARGE | sizes(262144, 5376, 21504, 60, 32, 16, num_global_key_value_heads=4),
        30_697_345_340,
    ),
    "26B-A4B, 6 of its 30 layers": (
        GEMMA4_LARGE
        | GEMMA4_EXPERTS
        | {"moe_intermediate_size": 704}
        | sizes(262144, 2816, 2112, 6, 16, 8, num_global_key_value_heads=2),
        5_637_188_614,
    ),
}


@pytest.mark.parametrize("name", GEMMA4_MODELS)
def test_gemma_4_has_as_many_parameters_as_transformers(name):
    """Layers differ, so all are counted; and those of the config.json that lorakit writes.

    The pages state 2.3B (5.1B with the second embedding, and 0.45B of towers) for E2B, 4.5B (8B),
    11.95B with its projections of images and sound, 30.7B and 25.2B.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values, count = GEMMA4_MODELS[name]
    config = lk.ModelConfig.from_hf(values)
    with torch.device("meta"):
        model = Decoder(config)
        tables = sum(table.weight.numel() for table in host_tables(model).values())
        assert sum(p.numel() for p in model.parameters()) + tables == count
        for content in (values, config.to_hf()):
            theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
            scalars = [b for n, b in theirs.named_buffers() if n.endswith("layer_scalar")]
            assert sum(p.numel() for p in [*theirs.parameters(), *scalars]) == count
    assert lk.ModelConfig.from_hf(config.to_hf()) == config


def test_gemma_4_26b_has_the_stated_number_of_parameters():
    """Its layers come in groups of six; its page states 25.2B."""
    _, count = GEMMA4_MODELS["26B-A4B, 6 of its 30 layers"]
    outside = 262144 * 2816 + 2816  # the embedding and the last norm
    assert outside + 5 * (count - outside) == 25_233_141_790


QWEN35 = {
    "model_type": "qwen3_5_text",
    "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_type": "default"},
    "max_position_embeddings": 262144,
    "head_dim": 256,
}
LINEAR = {
    "Qwen 3.5 0.8B": (
        QWEN35
        | {"linear_num_value_heads": 16, "tie_word_embeddings": True}
        | sizes(248320, 1024, 3584, 24, 8, 2),
        752_393_024,
    ),
    "Qwen 3.5 4B": (
        QWEN35 | sizes(248320, 2560, 9216, 32, 16, 4, tie_word_embeddings=True),
        4_205_751_296,
    ),
    "Qwen 3.5 27B": (
        QWEN35 | {"linear_num_value_heads": 48} | sizes(248320, 5120, 17408, 64, 24, 4),
        26_895_998_464,
    ),
    "Qwen 3.5 35B A3B": (
        QWEN35 | {"model_type": "qwen3_5_moe_text"} | sizes(248320, 2048, 512, 40, 16, 2),
        34_660_610_688,
    ),
    "Qwen3 Next 80B A3B": (
        {"model_type": "qwen3_next", "rope_theta": 1e7, "head_dim": 256}
        | sizes(151936, 2048, 5120, 48, 16, 2),
        79_674_391_296,
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_models_with_linear_attention(name, tmp_path):
    """Three layers of linear attention and a full one, again and again: transformers' four layers
    have the shapes of ours, and as many of them as the model has make up its size.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values, count = LINEAR[name]
    config = lk.ModelConfig.from_hf(values)
    layers = config.num_hidden_layers
    assert config.linear_layers == [True, True, True, False] * (layers // 4)
    four = lk.ModelConfig.from_hf(values | {"num_hidden_layers": 4})
    with torch.device("meta"):
        ours = Decoder(four)
    for content in (values | {"num_hidden_layers": 4}, four.to_hf()):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with torch.device("meta"):
            theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        per_model = []
        for model in (theirs, ours):
            inner = sum(p.numel() for p in model.model.layers.parameters())
            outside = sum(p.numel() for p in model.parameters()) - inner
            per_model.append(outside + layers // 4 * inner)
        assert per_model == [count, count]
        assert theirs.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
        rope = type(theirs.model.rotary_emb)(theirs.config)
        mine = inverse_frequencies(config.rope, config.head_dim, torch.device("cpu"))
        assert torch.allclose(mine, rope.inv_freq, rtol=1e-6)
        assert len(mine) == 32
    stated = float(re.search(r"([0-9.]+)B", name)[1])
    assert abs(count / 1e9 - stated) < 0.25 or round(count / 1e9) == stated


def test_a_published_qwen_3_5_config():
    """The keys that its files carry beside those of transformers' class change nothing."""
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    rope = {"mrope_interleaved": True, "mrope_section": [11, 11, 10]}
    text = QWEN35 | sizes(248320, 2560, 9216, 32, 16, 4)
    text |= {"rope_parameters": QWEN35["rope_parameters"] | rope, "layer_types": kinds * 8}
    text |= {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mlp_only_layers": []}
    text |= {"mtp_num_hidden_layers": 1, "full_attention_interval": 4, "eos_token_id": 248044}
    whole = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": True}
    config = lk.ModelConfig.from_hf(whole)
    plain = QWEN35 | sizes(248320, 2560, 9216, 32, 16, 4, tie_word_embeddings=True)
    expected = lk.ModelConfig.from_hf(plain | {"eos_token_id": 248044})
    assert config.to_hf() == expected.to_hf() | {
        "rope_parameters": config.to_hf()["rope_parameters"]
    }
    assert config.linear_layers == expected.linear_layers
    assert (config.rope.rope_theta, config.rope.partial_rotary_factor) == (1e7, 0.25)
    assert (config.attention_gate, config.eos_token_ids) == (True, [248044])
