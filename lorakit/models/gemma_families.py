"""The rows of FAMILIES for Gemma 1 to 4; families.py has the others."""

from typing import Any

from lorakit.models.family import LEFTOVERS, Family

_GEMMA = {
    "norm_weight_offset": 1.0,
    "norm_casting_mode": "gemma",
    "scale_embeddings": True,
}
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA4 = {
    "norm_casting_mode": "gemma",
    "norm_placement": "sandwich",
    "qk_norm": "head",
    "v_norm": True,
    "layer_scalar": True,
    "scale_embeddings": True,
    "attention_multiplier": 1.0,
    "moe_beside_mlp": True,
    "moe_names": ["", "gate_proj", "up_proj", "down_proj"],
    "fused_experts": True,
}
_GEMMA4_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 1e4,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "final_logit_softcapping": None,
    "use_bidirectional_attention": "vision",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA_FAMILIES = {
    "gemma": Family(
        "GemmaForCausalLM",
        _GEMMA,
        _GEMMA_DEFAULTS,
        ignored=LEFTOVERS,
        activations={"gelu": "gelu_pytorch_tanh"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA | {"norm_placement": "sandwich"},
        _GEMMA2_DEFAULTS
        | {
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        ignored=("sliding_window_pattern",),
        activation="hidden_activation",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA | {"norm_placement": "sandwich", "qk_norm": "head"},
        _GEMMA2_DEFAULTS
        | {
            "vocab_size": 262208,
            "sliding_window_pattern": 6,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        activation="hidden_activation",
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        _GEMMA4,
        _GEMMA4_DEFAULTS
        | {
            "max_position_embeddings": 131072,
            "sliding_window": 512,
            "use_bidirectional_attention": None,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262144,
            "enable_moe_block": False,
            "top_k_experts": None,
        },
        ignored=("sliding_window_pattern", "rope_local_base_freq", "mlp_bias"),
        activation="hidden_activation",
        last_is_full=True,
    ),
    "gemma4_unified_text": Family(
        "Gemma4UnifiedForCausalLM",
        _GEMMA4,
        _GEMMA4_DEFAULTS,
        ignored=("sliding_window_pattern", "rope_local_base_freq", "mlp_bias"),
        activation="hidden_activation",
        last_is_full=True,
    ),
}
"""model_type -> the family of a model of Gemma's."""
