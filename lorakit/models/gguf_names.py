"""Names and keys of GGUF files, by architecture: one table, for reading and for writing.

A *dialect* says how the files of one architecture name and store what Hugging Face's files hold.
models/gguf.py reads by it, export/ writes by it. An architecture may have two, of families that
differ in one setting. Values differ from the published ones in three ways, whose inverses stand
here side by side:

- The files of Llama, Mistral and their relatives store the rows of q_proj and k_proj in another
  order: the two halves of a head are interleaved, for a rotary embedding that turns neighbours.
- Gemma's norm weights are stored as what norms multiply by, one more than the published weight.
- All experts of a layer lie in one tensor [E, out, in].
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.models.config import ModelConfig
from lorakit.models.gguf_gemma4 import GEMMA4, GEMMA4_KEYS, GEMMA4_OUTSIDE, GEMMA4_WHOLE
from lorakit.models.gguf_linear import LINEAR, LINEAR_KEYS, LINEAR_WHOLE, linear_change

# GGUF's names -> Hugging Face's: first of the tensors outside the layers, then of those in a layer.
_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ATTENTION = _NORMS | _PROJECTIONS
# The same, where the second norm has another name.
_NORM_AFTER = _PROJECTIONS | {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FUSED = _NORMS | {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORMS = _PROJECTIONS | {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GPT_OSS = _NORM_AFTER | _QWEN_EXPERTS | {"ffn_gate_inp": "mlp.router"}
_QWEN_LINEAR = _NORM_AFTER | _QK_NORM | LINEAR
_SHARED_GATE, _CONVOLUTION = "mlp.shared_expert_gate.weight", "linear_attn.conv1d.weight"

# Keys of config.json -> keys of the file, without the architecture before them.
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
_MIXTRAL_KEYS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_QWEN_MOE_KEYS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_QWEN2_MOE_KEYS = _QWEN_MOE_KEYS | {
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length"
}
_GRANITE_KEYS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_WINDOW_KEYS = {
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
}
_GEMMA_KEYS = _WINDOW_KEYS | {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope_local_base_freq": "rope.freq_base_swa",
}
TOKEN_KEYS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


class Dialect(NamedTuple):
    """How the files of one architecture name and store what they hold."""

    model_type: str
    """Hugging Face's name of the architecture."""
    names: Mapping[str, str]
    """GGUF's names of a layer's tensors -> Hugging Face's."""
    keys: Mapping[str, str] = MappingProxyType({})
    """Keys of config.json -> keys of the file, beside those of KEYS."""
    defaults: Mapping[str, Any] = MappingProxyType({})
    """Values of config.json for keys that the file leaves out."""
    permuted: bool = False
    """Whether the rows of q_proj and k_proj are interleaved."""
    norm_offset: float = 0.0
    """The number that was added to the norm weights."""
    partial: bool = False
    """Whether a share of each head turns, which the file states as rope.dimension_count."""
    full_width_layers: int | None = None
    """The number of layers of the one size whose attention scale is 1 / sqrt(hidden_size / heads).

    The other sizes scale by 1 / sqrt(head_dim). None means that all sizes do.
    """
    whole: Mapping[str, str] = MappingProxyType({})
    """The same as `names`, for tensors whose names end otherwise in the two."""
    outside: Mapping[str, str] = MappingProxyType(_OUTSIDE)
    """GGUF's names of the tensors outside the layers -> Hugging Face's."""


_LLAMA = Dialect("llama", _ATTENTION | _MLP, permuted=True)
MIXTRAL = Dialect("mixtral", _ATTENTION | _MIXTRAL_EXPERTS, _MIXTRAL_KEYS, permuted=True)
MISTRAL = Dialect("mistral", _ATTENTION | _MLP, defaults={"sliding_window": None}, permuted=True)
OLMO2 = Dialect("olmo2", _POST_NORMS | _QK_NORM | _MLP)
DIALECTS = {
    "llama": _LLAMA,  # MIXTRAL if it has experts
    "mistral3": Dialect("ministral3", _ATTENTION | _MLP, permuted=True),  # MISTRAL if unscaled
    "smollm3": Dialect("smollm3", _ATTENTION | _MLP, permuted=True),
    "granite": Dialect("granite", _ATTENTION | _MLP, _GRANITE_KEYS, permuted=True),
    "phi3": Dialect("phi3", _FUSED, {"sliding_window": "attention.sliding_window"}, partial=True),
    "olmo2": Dialect("olmo3", _POST_NORMS | _QK_NORM | _MLP, _WINDOW_KEYS),  # OLMO2 if no window
    "seed_oss": Dialect("seed_oss", _NORM_AFTER | _MLP, defaults={"attention_bias": True}),
    "qwen2": Dialect("qwen2", _ATTENTION | _MLP),
    "qwen3": Dialect("qwen3", _ATTENTION | _QK_NORM | _MLP),
    "qwen2moe": Dialect("qwen2_moe", _ATTENTION | _QWEN_EXPERTS | _SHARED_EXPERT, _QWEN2_MOE_KEYS),
    "qwen3moe": Dialect(
        "qwen3_moe",
        _ATTENTION | _QK_NORM | _QWEN_EXPERTS,
        _QWEN_MOE_KEYS,
        {"norm_topk_prob": True},
    ),
    "qwen3next": Dialect(
        "qwen3_next",
        _QWEN_LINEAR | _QWEN_EXPERTS | _SHARED_EXPERT,
        LINEAR_KEYS | _QWEN2_MOE_KEYS,
        {"norm_topk_prob": True},
        norm_offset=1.0,
        partial=True,
        whole=LINEAR_WHOLE,
    ),
    "qwen35": Dialect(
        "qwen3_5_text",
        _QWEN_LINEAR | _MLP,
        LINEAR_KEYS,
        norm_offset=1.0,
        partial=True,
        whole=LINEAR_WHOLE,
    ),
    "qwen35moe": Dialect(
        "qwen3_5_moe_text",
        _QWEN_LINEAR | _QWEN_EXPERTS | _SHARED_EXPERT,
        LINEAR_KEYS | _QWEN2_MOE_KEYS,
        norm_offset=1.0,
        partial=True,
        whole=LINEAR_WHOLE,
    ),
    "gemma": Dialect("gemma", _ATTENTION | _MLP, norm_offset=1.0),
    "gemma2": Dialect(
        "gemma2",
        _ATTENTION | _SANDWICH_NORMS | _MLP,
        _GEMMA_KEYS,
        {
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        norm_offset=1.0,
        full_width_layers=46,  # 27B
    ),
    "gemma3": Dialect(
        "gemma3_text",
        _ATTENTION | _QK_NORM | _SANDWICH_NORMS | _MLP,
        _GEMMA_KEYS,
        {"sliding_window": None, "rope_local_base_freq": 10000.0},
        norm_offset=1.0,
        full_width_layers=62,  # 27B
    ),
    "gpt-oss": Dialect(
        "gpt_oss",
        _GPT_OSS,
        {
            "sliding_window": "attention.sliding_window",
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "intermediate_size": "expert_feed_forward_length",
        },
        {"attention_bias": True},
        whole={"attn_sinks.weight": "self_attn.sinks"},
    ),
    "gemma4": Dialect(
        "gemma4_text",
        _ATTENTION | _QK_NORM | _SANDWICH_NORMS | _MLP | GEMMA4,
        GEMMA4_KEYS,
        whole=GEMMA4_WHOLE,
        outside=_OUTSIDE | GEMMA4_OUTSIDE,
    ),
}


def dialect_of(config: ModelConfig) -> tuple[str, Dialect]:
    """Return GGUF's name of a model's architecture, and its dialect.

    Raises LorakitError if the model's family has none here.
    """
    if config.model_type in ("mistral", MIXTRAL.model_type):
        return "llama", MIXTRAL if any(config.moe_layers) else _LLAMA
    if config.model_type == "gemma4_unified_text":  # files know one name
        return "gemma4", DIALECTS["gemma4"]
    for arch, dialect in [*DIALECTS.items(), ("olmo2", OLMO2)]:
        if dialect.model_type == config.model_type:
            return arch, dialect
    raise LorakitError(
        f"models of model_type {config.model_type!r} are not written as GGUF; save_model writes "
        "safetensors, which llama.cpp's convert_hf_to_gguf.py takes"
    )


# ---- the names of tensors ----


def published_name(name: str, dialect: Dialect) -> str | None:
    """Return the Hugging Face name of a file's tensor, with {} for the number of each expert in it.

    The result is None if the architecture has no such tensor.
    """
    match name.split("."):
        case [stem, leaf] if stem in dialect.outside:
            return f"{dialect.outside[stem]}.{leaf}"
        case ["blk", layer, *rest] if (inner := ".".join(rest)) in dialect.whole:
            return f"model.layers.{layer}.{dialect.whole[inner]}"
        case ["blk", layer, stem, leaf] if stem in dialect.names:
            return f"model.layers.{layer}.{dialect.names[stem]}.{leaf}"
        case ["blk", layer, stem, expert, leaf] if f"{stem}_exps" in dialect.names:  # older files
            module = dialect.names[f"{stem}_exps"].replace("{}", expert)
            return f"model.layers.{layer}.{module}.{leaf}"
    return None


def stored_name(published: str, dialect: Dialect) -> tuple[str, int | None]:
    """Return a file's name of a published tensor, and the number of the expert that it is of."""
    module, _, leaf = published.rpartition(".")
    outside = {theirs: stem for stem, theirs in dialect.outside.items()}
    if module in outside:
        return f"{outside[module]}.{leaf}", None
    found = re.fullmatch(r"model\.layers\.(\d+)\.((.+)\..+|.+)", published)
    assert found is not None  # a decoder has no other modules
    layer, rest, inner = found.groups()
    whole = {theirs: stem for stem, theirs in dialect.whole.items()}
    if rest in whole:
        return f"blk.{layer}.{whole[rest]}", None
    expert = re.search(r"\bexperts\.(\d+)\.", inner)
    if expert is not None:
        inner = inner.replace(expert.group(), "experts.{}.")
    stems = {theirs: stem for stem, theirs in dialect.names.items()}
    number = None if expert is None else int(expert[1])
    return f"blk.{layer}.{stems[inner]}.{leaf}", number


# ---- the values of tensors ----

Change = Callable[[Tensor], Tensor]


def published_shape(published: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the published shape of a stored tensor; some have a dimension of 1 more."""
    if published.endswith(_SHARED_GATE) and len(shape) == 1:
        return (1, *shape)
    if published.endswith(_CONVOLUTION) and len(shape) == 2:
        return (shape[0], 1, shape[1])
    return shape


def stored_shape(published: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a published tensor is stored in."""
    if published.endswith((_SHARED_GATE, _CONVOLUTION)):
        return tuple(size for size in shape if size != 1)
    return shape


def restoration(published: str, dialect: Dialect, config: ModelConfig) -> Change | None:
    """Return the function that turns a stored tensor into the published one, if they differ."""
    heads = _permuted_heads(published, dialect, config)
    if heads is not None:
        return partial(_unpermute, heads=heads)
    if _is_offset(published, dialect):
        return lambda weight: weight - dialect.norm_offset
    return linear_change(published, config, stores=False)


def storage(published: str, dialect: Dialect, config: ModelConfig) -> Change | None:
    """Return the function that turns a published tensor into the stored one, if they differ."""
    heads = _permuted_heads(published, dialect, config)
    if heads is not None:
        return partial(_permute, heads=heads)
    if _is_offset(published, dialect):
        return lambda weight: weight.float() + dialect.norm_offset
    return linear_change(published, config, stores=True)


def _is_offset(published: str, dialect: Dialect) -> bool:
    """Return whether a tensor is the weight of a norm that is stored as what it multiplies by."""
    is_norm = published.endswith("norm.weight") and not published.endswith(
        "linear_attn.norm.weight"
    )
    return is_norm and dialect.norm_offset != 0


def _permuted_heads(published: str, dialect: Dialect, config: ModelConfig) -> int | None:
    """Return how many heads a tensor has whose rows are interleaved; None if they are not."""
    if not dialect.permuted:
        return None
    if "q_proj" in published:
        return config.num_attention_heads
    return config.num_key_value_heads if "k_proj" in published else None


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Bring the rows of weight [heads * D, ...] from (head, pair, half) to (head, half, pair)."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, -1).transpose(1, 2).reshape(weight.shape)


def _permute(weight: Tensor, heads: int) -> Tensor:
    """Bring the rows of weight [heads * D, ...] from (head, half, pair) to (head, pair, half)."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, pairs, -1).transpose(1, 2).reshape(weight.shape)
