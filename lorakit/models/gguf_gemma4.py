"""Gemma 4 in GGUF files: names, keys, and what a file says of its layers.

Sizes that differ from layer to layer are lists there: heads of keys and values, widths of the MLPs,
which layers have the window. The rotary embedding of the full layers is stored as divisors of the
frequencies, 1 for the pairs that turn and 1e30 for the others. Experts lie in one tensor for gate
and up together, gate first.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.files.gguf import TensorInfo
from lorakit.models.config import ModelConfig

GEMMA4 = {
    "ffn_gate_inp": "router.proj",
    "ffn_gate_up_exps": "experts.{}.gate_proj+up_proj",
    "ffn_gate_exps": "experts.{}.gate_proj",
    "ffn_up_exps": "experts.{}.up_proj",
    "ffn_down_exps": "experts.{}.down_proj",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
"""GGUF's names of a layer's tensors -> Hugging Face's, beside those that Gemma 3 has too."""
GEMMA4_WHOLE = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
}
"""Those whose names end otherwise."""
GEMMA4_OUTSIDE = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
"""Those of tensors outside the layers."""
GEMMA4_KEYS = {
    "global_head_dim": "attention.key_length",
    "head_dim": "attention.key_length_swa",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope_local_base_freq": "rope.freq_base_swa",
    "num_kv_shared_layers": "attention.shared_kv_layers",
    "hidden_size_per_layer_input": "embedding_length_per_layer_input",
    "num_experts": "expert_count",
    "top_k_experts": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
"""Keys of config.json -> keys of the file."""


_STILL = 1e30  # divides the frequency of a pair that does not turn


def gemma4_metadata(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a file that say what `gemma4_layers` reads, and the rotary embeddings."""
    layers = range(config.num_hidden_layers)
    wide, size = config.rope_head_dims
    assert config.rope_local is not None, "a model of another kind is refused before"
    return {
        "feed_forward_length": _one_or_list([config.mlp_width(i) for i in layers]),
        "attention.head_count_kv": _one_or_list([config.layer_kv_heads(i) for i in layers]),
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "attention.sliding_window_pattern": [config.slides(i) for i in layers],
        "attention.key_length": wide,
        "attention.value_length": wide,
        "attention.key_length_swa": size,
        "attention.value_length_swa": size,
        "rope.dimension_count": wide,
        "rope.dimension_count_swa": size,
        "rope.freq_base_swa": config.rope_local.rope_theta,
    }


def _one_or_list(numbers: list[int]) -> int | list[int]:
    """Return a number for each layer, or one for all of them."""
    return numbers if len(set(numbers)) > 1 else numbers[0]


def proportional_divisors(config: ModelConfig) -> Tensor:
    """Return by what a file divides the frequencies of the full layers, fp32 [D / 2]."""
    pairs = config.rope_head_dims[0] // 2
    divisors = torch.full((pairs,), _STILL)
    divisors[: int(pairs * config.rope.partial_rotary_factor)] = 1
    return divisors


def gemma4_layers(values: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Turn what a file lists for each layer into the values of config.json."""
    pattern, heads = values.get("sliding_window_pattern"), values.get("num_key_value_heads")
    full = pattern.index(False) if isinstance(pattern, list) and False in pattern else None
    if isinstance(heads, list) and heads:
        values["num_key_value_heads"] = heads[0] if full != 0 else heads[-1]
        if full is not None and full < len(heads) and heads[full] != heads[0]:
            values["num_global_key_value_heads"] = heads[full]
    widths = values.get("intermediate_size")
    if isinstance(widths, list) and widths:
        values["intermediate_size"], values["use_double_wide_mlp"] = widths[0], len(set(widths)) > 1
    if full is not None:
        values["attention_k_eq_v"] = f"blk.{full}.attn_v.weight" not in tensors
    values["enable_moe_block"] = bool(values.get("num_experts"))
    table = tensors.get("per_layer_token_embd.weight")
    if table is not None and len(table.shape) == 2:
        values["vocab_size_per_layer_input"] = table.shape[0]
