"""GGUF files as models: the config and the published weights that a file stands for.

files/gguf.py reads the container. Here its names, keys and values become Hugging Face's. A file's
weights differ from the published ones in three ways, which are undone as a tensor is read:

- `llama` files (Llama, Mistral, Mixtral) store the rows of q_proj and k_proj in another order: the
  two halves of a head are interleaved, for a rotary embedding that turns neighbours.
- Gemma's norm weights are stored as what norms multiply by, one more than the published weight.
- All experts of a layer lie in one tensor [E, out, in]. Here each expert is a tensor of its own,
  and reading it reads its bytes alone.

A file leaves some things unsaid. For these lorakit computes what llama.cpp does: Gemma's attention
scale goes by the number of layers, Qwen has no sliding window, Qwen3-MoE's expert weights sum to
one.

Metadata of a wrong type, sizes that do not fit each other, and tensors that the architecture does
not have raise a LorakitError. Nothing that a file says is believed without a check.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.config.fields import from_mapping
from lorakit.files.gguf import Header, TensorInfo, data_length, fp32_reader, read_header
from lorakit.files.safetensors import LazyTensor
from lorakit.models.config import ModelConfig, RopeConfig
from lorakit.models.rope import inverse_frequencies

# GGUF's names -> Hugging Face's: first of the tensors outside the layers, then of those in a layer.
_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
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

# Keys of config.json -> keys of the file, without the architecture before them.
_KEYS = {
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
_GEMMA_KEYS = {
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope_local_base_freq": "rope.freq_base_swa",
}
_TOKEN_KEYS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


class _Dialect(NamedTuple):
    """How the files of one architecture name and store what they hold."""

    model_type: str
    """Hugging Face's name of the architecture."""
    names: Mapping[str, str]
    """GGUF's names of a layer's tensors -> Hugging Face's."""
    keys: Mapping[str, str] = MappingProxyType({})
    """Keys of config.json -> keys of the file, beside those of _KEYS."""
    defaults: Mapping[str, Any] = MappingProxyType({})
    """Values of config.json for keys that the file leaves out."""
    permuted: bool = False
    """Whether the rows of q_proj and k_proj are interleaved."""
    norm_offset: float = 0.0
    """The number that was added to the norm weights."""
    full_width_layers: int | None = None
    """The number of layers of the one size whose attention scale is 1 / sqrt(hidden_size / heads).

    The other sizes scale by 1 / sqrt(head_dim). None means that all sizes do.
    """


_LLAMA = _Dialect("llama", _ATTENTION | _MLP, permuted=True)
_MIXTRAL = _Dialect("mixtral", _ATTENTION | _MIXTRAL_EXPERTS, _MIXTRAL_KEYS, permuted=True)
_DIALECTS = {
    "llama": _LLAMA,  # _MIXTRAL if it has experts
    "qwen2": _Dialect("qwen2", _ATTENTION | _MLP),
    "qwen3": _Dialect("qwen3", _ATTENTION | _QK_NORM | _MLP),
    "qwen3moe": _Dialect(
        "qwen3_moe",
        _ATTENTION | _QK_NORM | _QWEN_EXPERTS,
        _QWEN_MOE_KEYS,
        {"norm_topk_prob": True},
    ),
    "gemma": _Dialect("gemma", _ATTENTION | _MLP, norm_offset=1.0),
    "gemma2": _Dialect(
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
    "gemma3": _Dialect(
        "gemma3_text",
        _ATTENTION | _QK_NORM | _SANDWICH_NORMS | _MLP,
        _GEMMA_KEYS,
        {"sliding_window": None, "rope_local_base_freq": 10000.0},
        norm_offset=1.0,
        full_width_layers=62,  # 27B
    ),
}


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Return a file's config, and its tensors under Hugging Face's names, still on disk.

    Every tensor reads as fp32, with the values of the published weight. Reading it raises
    LorakitError if the gguf package cannot dequantize its block format.

    Raises:
        LorakitError: The file is damaged or cut off, lorakit does not have its architecture, or a
            tensor does not belong to the architecture.
    """
    header = read_header(path)
    if header.metadata.get("general.type") == "adapter":
        raise LorakitError(
            f"{path} is an adapter: load the model that it was trained on, then this file with "
            "load_adapter"
        )
    lengths = {name: data_length(path, name, info) for name, info in header.tensors.items()}
    dialect = _dialect(path, header)
    config = _model_config(path, header, dialect)
    tensors = {}
    for name, info in header.tensors.items():
        if dialect.permuted and name == "rope_freqs.weight":  # the config has read it
            continue
        hf_name = _hf_name(path, name, dialect)
        if "{}" in hf_name:
            for i, expert in enumerate(_experts(path, name, info, lengths[name], config)):
                read = fp32_reader(path, expert, lengths[name] // config.num_experts)
                tensors[hf_name.replace("{}", str(i))] = LazyTensor(expert.shape, read)
        else:
            read = fp32_reader(path, info, lengths[name])
            restore = _restoration(hf_name, dialect, config)
            if restore is not None:
                read = partial(_restored, read, restore)
            tensors[hf_name] = LazyTensor(info.shape, read)
    return config, tensors


def adapted_weight(
    path: Path, header: Header, name: str, config: ModelConfig | None
) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    """Return which weight a file of an adapter means, and how the rows of a change are ordered.

    Args:
        path: The file, for messages.
        header: Its header.
        name: The name of the weight in the file, such as blk.0.attn_q.weight.
        config: The model that is adapted; None leaves the rows as they are in the file.

    Returns:
        The published name, with {} for the number of each expert in it. Beside it stands a function
        that brings the rows of a change [out, ...] into the published order, or None if they are.

    Raises:
        LorakitError: lorakit lacks the architecture, or it has no such weight.
    """
    dialect = _dialect(path, header)
    published = _hf_name(path, name, dialect)
    return published, None if config is None else _restoration(published, dialect, config)


def _dialect(path: Path, header: Header) -> _Dialect:
    """Return the dialect of a file's architecture; refuse an architecture that has none."""
    arch = header.metadata.get("general.architecture")
    if arch not in list(_DIALECTS):  # a list: a damaged file may hold what cannot be hashed
        known = ", ".join(_DIALECTS)
        raise LorakitError(f"{path}: architecture {arch!r} is not supported; supported are {known}")
    experts = any("_exps." in name or "_gate_inp." in name for name in header.tensors)
    if arch == "llama" and (experts or header.metadata.get("llama.expert_count")):
        return _MIXTRAL
    return _DIALECTS[arch]


# ---- tensors ------------------------------------------------------------------------------------


def _hf_name(path: Path, name: str, dialect: _Dialect) -> str:
    """Return the Hugging Face name of a tensor, with {} for the number of each expert in it."""
    match name.split("."):
        case [stem, leaf] if stem in _OUTSIDE:
            return f"{_OUTSIDE[stem]}.{leaf}"
        case ["blk", layer, stem, leaf] if stem in dialect.names:
            return f"model.layers.{layer}.{dialect.names[stem]}.{leaf}"
        case ["blk", layer, stem, expert, leaf] if f"{stem}_exps" in dialect.names:  # older files
            module = dialect.names[f"{stem}_exps"].replace("{}", expert)
            return f"model.layers.{layer}.{module}.{leaf}"
    raise LorakitError(f"{path}: tensor {name} belongs to no {dialect.model_type} model")


def _experts(
    path: Path, name: str, info: TensorInfo, length: int, config: ModelConfig
) -> Iterator[TensorInfo]:
    """Yield the tensors of the single experts; `info` [E, out, in] holds `length` bytes of them."""
    if len(info.shape) != 3 or info.shape[0] != config.num_experts or length == 0:
        raise LorakitError(
            f"{path}: tensor {name} is {info.shape}, not ({config.num_experts} experts, out, in)"
        )
    step = length // info.shape[0]
    for i in range(info.shape[0]):
        yield TensorInfo(info.shape[1:], info.kind, info.offset + i * step)


def _restoration(
    hf_name: str, dialect: _Dialect, config: ModelConfig
) -> Callable[[Tensor], Tensor] | None:
    """Return the function that turns a stored tensor into the published one, if they differ."""
    if dialect.permuted and "q_proj" in hf_name:
        return partial(_unpermute, heads=config.num_attention_heads)
    if dialect.permuted and "k_proj" in hf_name:
        return partial(_unpermute, heads=config.num_key_value_heads)
    if dialect.norm_offset and hf_name.endswith("norm.weight"):
        return lambda weight: weight - dialect.norm_offset
    return None


def _restored(read: Callable[[], Tensor], restore: Callable[[Tensor], Tensor]) -> Tensor:
    return restore(read())


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Bring the rows of weight [heads * D, ...] from (head, pair, half) to (head, half, pair)."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, -1).transpose(1, 2).reshape(weight.shape)


# ---- the config ---------------------------------------------------------------------------------


def _model_config(path: Path, header: Header, dialect: _Dialect) -> ModelConfig:
    """Return the config that the metadata and the names of the tensors describe."""
    arch = header.metadata["general.architecture"]
    values = _given_values(header.metadata, arch, dialect)
    _add_what_tensors_say(values, header.tensors)
    _add_derived_values(values, dialect)
    values["rope_scaling"] = _rope_scaling(path, header.metadata, f"{arch}.rope")
    config = ModelConfig.from_hf(values, str(path))
    if dialect.permuted and "rope_freqs.weight" in header.tensors:
        rope = _llama3_rope(path, header.tensors["rope_freqs.weight"], config)
        config = dataclasses.replace(config, rope=rope)
    rotated = header.metadata.get(f"{arch}.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise LorakitError(
            f"{path}: a rotary embedding of {rotated} of {config.head_dim} dimensions "
            "is not supported"
        )
    return config


def _given_values(metadata: Mapping[str, Any], arch: str, dialect: _Dialect) -> dict[str, Any]:
    """Return config.json's values that the metadata holds under other keys, and the defaults."""
    keys = {name: f"{arch}.{key}" for name, key in {**_KEYS, **dialect.keys}.items()} | _TOKEN_KEYS
    values = {"model_type": dialect.model_type, "rope_theta": 10000.0, **dialect.defaults}
    values |= {name: metadata[key] for name, key in keys.items() if key in metadata}
    if "vocab_size" not in values and isinstance(metadata.get("tokenizer.ggml.tokens"), list):
        values["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    ends = [values.get("eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")]
    if None not in ends and ends[0] != ends[1]:  # the end of a turn, where that is another token
        values["eos_token_id"] = ends
    return values


def _add_what_tensors_say(values: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values["attention_bias"] = "blk.0.attn_output.bias" in tensors  # Qwen2's others go by its type
    values["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors


def _add_derived_values(values: dict[str, Any], dialect: _Dialect) -> None:
    """Add the values that llama.cpp computes from others: head_dim, Gemma's scale, the windows."""
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if type(hidden) is int and type(heads) is int and heads > 0:
        values.setdefault("head_dim", hidden // heads)
        if dialect.full_width_layers is not None:
            full = values.get("num_hidden_layers") == dialect.full_width_layers
            values["query_pre_attn_scalar"] = hidden // heads if full else values["head_dim"]
    pattern = values.get("sliding_window_pattern")
    if isinstance(pattern, list):  # one entry per layer
        kinds = ("full_attention", "sliding_attention")
        values["layer_types"] = [kinds[bool(slides)] for slides in pattern]
        del values["sliding_window_pattern"]


def _rope_scaling(path: Path, metadata: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
    """Return config.json's rope_scaling, or None if the frequencies are the plain ones."""
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    factor = metadata.get(f"{prefix}.scaling.factor", metadata.get(f"{prefix}.scale_linear", 0.0))
    if kind == "none" or (kind == "linear" and factor == 0):
        return None
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if metadata.get(f"{prefix}.scaling.{key}", 1.0) != 1:
            raise LorakitError(f"{path}: {prefix}.scaling.{key} is not supported; it must be 1")
    keys = {
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    given = {name: metadata.get(f"{prefix}.scaling.{key}") for name, key in keys.items()}
    return {"rope_type": kind, "factor": factor or 1.0} | given


def _llama3_rope(path: Path, info: TensorInfo, config: ModelConfig) -> RopeConfig:
    """Return the rotary embedding that the divisors of the frequencies at `info` stand for.

    Files store Llama 3's scaling as these divisors, not as its four parameters. The first of them,
    the factor, is the largest divisor. Every published model uses 1, 4 and 8192 for the other
    three. A file whose divisors do not follow from these four is refused.
    """
    size, cpu = config.head_dim, torch.device("cpu")
    if info.shape != (size // 2,):
        raise LorakitError(f"{path}: rope_freqs.weight is {info.shape}, not ({size // 2},)")
    divisors = fp32_reader(path, info, data_length(path, "rope_freqs.weight", info))()
    scaled: RopeConfig = from_mapping(
        RopeConfig,
        {
            "rope_theta": config.rope.rope_theta,
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        f"{path}, rope parameters",
    )
    stored = inverse_frequencies(scaled, size, cpu) * divisors
    if not torch.allclose(stored, inverse_frequencies(config.rope, size, cpu), rtol=1e-4):
        raise LorakitError(f"{path}: rope_freqs.weight holds a rotary scaling other than Llama 3's")
    return scaled
