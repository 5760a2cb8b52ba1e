"""The model families: what a `model_type` means beyond the keys of its config.json.

A family is a row of `FAMILIES`: transformers' class, the `ModelConfig` fields that all its models
share, and the defaults of keys that published files leave out. A new family is a row here as long
as it computes nothing new. gemma_families.py has the rows of Gemma.

A model with other towers (vision, audio) is a wrapper around one of these families. `WRAPPERS`
lists the wrappers whose text model can be read and written back.
"""

from typing import Any

from lorakit.config.errors import LorakitError, nearest
from lorakit.models.family import LEFTOVERS, Family
from lorakit.models.gemma_families import GEMMA_FAMILIES

_ENDS = {"bos_token_id": 1, "eos_token_id": 2}  # of Llama 2's vocabulary
_MISTRAL = _ENDS | {"num_key_value_heads": 8, "max_position_embeddings": 131072}
_YARN_OF_MINISTRAL = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_YARN_OF_GPT_OSS = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
_LLAMA3_OF_CWM = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_OLMO = {"norm_placement": "post", "qk_norm": "whole", "norm_casting_mode": "gemma"}
_OLMO_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 50279,
    "pad_token_id": 1,
}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_QWEN_VL = _QWEN | {
    "num_key_value_heads": 8,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
# A position in an image has three numbers, and sections of the frequencies for each. In text the
# three are equal, so that the rotary embedding is the plain one.
_MROPE: dict[str, Any] = {"rope_types": {"mrope": "default"}}
_QWEN_LINEAR = {
    "qk_norm": "head",
    "norm_weight_offset": 1.0,
    "norm_casting_mode": "gemma",
    "attention_gate": True,
}
_QWEN_LINEAR_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_QWEN_LINEAR_MOE = _QWEN_LINEAR_DEFAULTS | {
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        defaults=_ENDS | {"max_position_embeddings": 2048},
        ignored=LEFTOVERS,
    ),
    "mistral": Family("MistralForCausalLM", defaults=_MISTRAL | {"sliding_window": 4096}),
    "ministral": Family("MinistralForCausalLM", defaults=_MISTRAL | {"sliding_window": 4096}),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        defaults=_MISTRAL
        | {
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 11,
            "rope_parameters": _YARN_OF_MINISTRAL,
        },
        ignored=("layer_types",),
    ),
    "cwm": Family(
        "CwmForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": 8192,
            "rope_theta": 1e6,
            "rope_parameters": _LLAMA3_OF_CWM,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
        },
        ignored=("attention_bias",),
        slides=lambda layer, _: layer % 4 != 0,
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        ignored=LEFTOVERS,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
        ignored=("max_window_layers",),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        fields={"fused_qkv": True, "fused_gate_up": True},
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1.0,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        ignored=("attention_bias", "mlp_bias", "layer_types"),
        rope_types={"su": "longrope", "yarn": "longrope"},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        defaults=_ENDS
        | {
            "max_position_embeddings": 2048,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "attention_multiplier": 1.0,
        },
        ignored=LEFTOVERS,
    ),
    "olmo2": Family("Olmo2ForCausalLM", _OLMO, _OLMO_DEFAULTS, ignored=LEFTOVERS),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _OLMO,
        _OLMO_DEFAULTS
        | {
            "rope_theta": 5e5,
            "rope_local_base_freq": None,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        ignored=("sliding_window_pattern", "rope_local_base_freq"),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        fields={"moe_names": ["block_sparse_moe", "w1", "w3", "w2"]},
        defaults=_MISTRAL
        | {
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fields={"qkv_bias": True},
        defaults=_QWEN | {"max_window_layers": 28},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        defaults=_QWEN
        | {
            "num_key_value_heads": 16,
            "max_window_layers": 28,
            "qkv_bias": True,
            "num_local_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
        },
        ignored=("attention_bias",),
        slides=lambda layer, first: layer % 2 == 0 and layer < first,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fields={"qk_norm": "head"},
        defaults=_QWEN | {"max_window_layers": 28, "head_dim": 128},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        fields={"qk_norm": "head"},
        defaults=_QWEN
        | {
            "num_key_value_heads": 4,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        ignored=("max_window_layers", "layer_types"),
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        _QWEN_LINEAR | {"fused_qkvz": True},
        _QWEN_LINEAR_MOE
        | {"intermediate_size": 5632, "num_local_experts": 512, "num_experts_per_tok": 10},
        ignored=("sliding_window",),
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        _QWEN_LINEAR,
        _QWEN_LINEAR_DEFAULTS | {"num_key_value_heads": 4, "rope_parameters": {}},
        ignored=("sliding_window",),
        **_MROPE,
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        _QWEN_LINEAR | {"norm_topk_prob": True},
        _QWEN_LINEAR_MOE
        | {
            # of layers that no such model has
            "intermediate_size": 512,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "rope_parameters": {},
        },
        ignored=("sliding_window", "decoder_sparse_step", "mlp_only_layers"),
        **_MROPE,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {
            "norm_casting_mode": "gemma",
            "attention_sinks": True,
            "hidden_act": "swiglu_oai",
            "mlp_bias": True,
            "norm_topk_prob": True,
            "router_name": "router",
            "router_bias": True,
            "fused_experts": True,
            "experts_transposed": True,
            "experts_interleaved": True,
        },
        {
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "attention_bias": True,
            "rope_theta": 150000.0,
            "rope_parameters": _YARN_OF_GPT_OSS,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
        },
        ignored=("hidden_act",),
        slides=lambda layer, _: layer % 2 == 0,
    ),
    "qwen2_vl_text": Family("Qwen2VLTextModel", {"qkv_bias": True}, _QWEN_VL, **_MROPE),
    "qwen2_5_vl_text": Family("Qwen2_5_VLTextModel", {"qkv_bias": True}, _QWEN_VL, **_MROPE),
    "qwen3_vl_text": Family(
        "Qwen3VLTextModel",
        {"qk_norm": "head"},
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 128000,
            "rope_theta": 5e5,
        },
        ignored=LEFTOVERS,
        **_MROPE,
    ),
    "qwen3_vl_moe_text": Family(
        "Qwen3VLMoeTextModel",
        {
            "qk_norm": "head",
            "norm_topk_prob": True,
            "fused_experts": True,
            "experts_transposed": True,
        },
        {
            "num_key_value_heads": 16,
            "max_position_embeddings": 128000,
            "tie_word_embeddings": True,
            "rope_theta": 5e5,
            "num_local_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
        },
        ignored=LEFTOVERS,
        **_MROPE,
    ),
    **GEMMA_FAMILIES,
}
WRAPPERS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
"""The model types of a text model beside other towers -> the text model's family.

That family holds where the file's text_config has no model_type of its own. The text model alone is
computed.
"""
FLAT_WRAPPERS = ("qwen2_vl", "qwen2_5_vl")
"""Those of them whose published files have no text_config, but its keys beside their own."""


def family_of(model_type: Any, around: str | None = None) -> Family:
    """Return the family of a model_type.

    Args:
        model_type: The model_type of a file, of any type.
        around: The model_type of the wrapper that holds this text model, if there is one.

    Returns:
        The row of FAMILIES.

    Raises:
        LorakitError: There is no such family.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    inside = "" if around is None else f", the text model of {around!r},"
    hint = nearest(model_type, FAMILIES) if isinstance(model_type, str) else ""
    raise LorakitError(
        f"model_type {model_type!r}{inside} is not supported; supported are "
        f"{', '.join([*FAMILIES, *WRAPPERS])}{hint}"
    )
