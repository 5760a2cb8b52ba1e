"""The widths of published models, for random checkpoints with fewer layers (training.py --shape).

The config.json of a model's repository has them. Layers of all kinds come in the model's order, so
that a few of them are a period of the whole. Gemma 4 E2B's period of five would leave four layers
without a full one, so its kinds take turns here, and the second half sees the keys of the first.
"""

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3.5-4b": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
    },
    "gemma-4-e2b": {
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "hidden_size": 1536,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 512,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
}


def config_of(shape: str, layers: int) -> dict[str, Any]:
    """The config.json of a model with these widths and so many layers."""
    config = SHAPES[shape] | {"num_hidden_layers": layers}
    if shape == "gemma-4-e2b":
        kinds = ["sliding_attention", "full_attention"] * layers
        config |= {"layer_types": kinds[:layers], "num_kv_shared_layers": layers // 2}
    return config
