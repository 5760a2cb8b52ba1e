"""GGUF files: the header, the tensors as dense values, and the model they describe.

Layout (GGUF 3, little endian): magic, version, counts; key-value pairs; tensor infos (name, dims
innermost first, type, offset); padding; the data of each tensor at its offset. The header is read
here, in one pass over the file's beginning; the `gguf` package, which knows every block format,
turns a tensor's bytes into fp32 values. (Its own reader makes several numpy arrays for each of the
vocabulary's strings: 4 s and 160 MB for a 49,152-token model, against 0.1 s and 15 MB.)

A file's weights are the published ones but for three things, which are undone as a tensor is read:

- `llama` files (Llama, Mistral, Mixtral) store the rows of q_proj and k_proj in another order: the
  two halves of a head are interleaved, for a rotary embedding that turns neighbours.
- Gemma's norm weights are stored as what norms multiply by, one more than the published weight.
- All experts of a layer lie in one tensor [E, out, in]. Each is a tensor of its own here, and its
  bytes alone are read.

What a file does not say is what llama.cpp computes: Gemma's attention scale goes by the number of
layers, Qwen has no sliding window, Qwen3-MoE's expert weights sum to one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.files.gguf import Header, TensorInfo, data_length, numpy_reader, read_header
from lorakit.models.config import ModelConfig

# GGUF -> Hugging Face: the tensors outside the layers, then those of a layer, by what a layer has
OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}

# config.json -> the file's key without the architecture before it
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
MIXTRAL_KEYS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
QWEN_MOE_KEYS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
GEMMA_KEYS = {
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope_local_base_freq": "rope.freq_base_swa",
}
TOKEN_KEYS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


class Family(NamedTuple):
    """What the files of one architecture hold."""

    model_type: str
    names: dict[str, str]
    """of a layer's tensors, Hugging Face's by GGUF's"""
    keys: dict[str, str] = {}  # noqa: RUF012
    """beside KEYS"""
    defaults: dict[str, Any] = {}  # noqa: RUF012
    """config.json's values where the file has no key"""
    permuted: bool = False
    """the rows of q_proj and k_proj"""
    norm_offset: float = 0.0
    """what was added to the norm weights"""
    full_width_layers: int | None = None
    """how many layers the one size has whose attention scale is 1 / sqrt(hidden_size / heads)"""


LLAMA = Family("llama", ATTENTION | MLP, permuted=True)
MIXTRAL = Family("mixtral", ATTENTION | MIXTRAL_EXPERTS, MIXTRAL_KEYS, permuted=True)
FAMILIES = {
    "llama": LLAMA,  # MIXTRAL if it has experts
    "qwen2": Family("qwen2", ATTENTION | MLP),
    "qwen3": Family("qwen3", ATTENTION | QK_NORM | MLP),
    "qwen3moe": Family(
        "qwen3_moe",
        ATTENTION | QK_NORM | QWEN_EXPERTS,
        QWEN_MOE_KEYS,
        {"norm_topk_prob": True},
    ),
    "gemma": Family("gemma", ATTENTION | MLP, norm_offset=1.0),
    "gemma2": Family(
        "gemma2",
        ATTENTION | SANDWICH_NORMS | MLP,
        GEMMA_KEYS,
        {
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        norm_offset=1.0,
        full_width_layers=46,  # 27B
    ),
    "gemma3": Family(
        "gemma3_text",
        ATTENTION | QK_NORM | SANDWICH_NORMS | MLP,
        GEMMA_KEYS,
        {"sliding_window": None, "rope_local_base_freq": 10000.0},
        norm_offset=1.0,
        full_width_layers=62,  # 27B
    ),
}


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, tuple[tuple[int, ...], Callable]]]:
    """The config, and per Hugging Face tensor name its shape and a function that reads it (fp32).

    Raises LorakitError for a damaged or truncated file, an architecture that is not in FAMILIES, a
    tensor type that the gguf package cannot dequantize, or a tensor that lorakit does not know.
    """
    header = read_header(path)
    size = path.stat().st_size
    lengths = {name: data_length(path, name, info) for name, info in header.tensors.items()}
    for name, info in header.tensors.items():
        if info.offset + lengths[name] > size:
            raise LorakitError(
                f"{path}: the file is cut off: tensor {name} ends at byte "
                f"{info.offset + lengths[name]}, the file at {size}"
            )
    family = _family(path, header.metadata)
    config = _model_config(path, header, family)
    tensors = {}
    for name, info in header.tensors.items():
        if family.permuted and name == "rope_freqs.weight":  # the config has read it
            continue
        hf_name = _hf_name(path, name, family)
        if "{}" in hf_name:
            for i, expert in enumerate(_experts(path, name, info, lengths[name], config)):
                read = numpy_reader(path, expert, lengths[name] // config.num_experts)
                tensors[hf_name.replace("{}", str(i))] = (expert.shape, read)
        else:
            read = numpy_reader(path, info, lengths[name], _restoration(hf_name, family, config))
            tensors[hf_name] = (info.shape, read)
    return config, tensors


def _family(path: Path, metadata: dict[str, Any]) -> Family:
    arch = metadata.get("general.architecture")
    if arch not in list(FAMILIES):  # a list: a damaged file may hold what cannot be hashed
        known = ", ".join(FAMILIES)
        raise LorakitError(f"{path}: architecture {arch!r} is not supported; supported are {known}")
    if arch == "llama" and metadata.get("llama.expert_count"):
        return MIXTRAL
    return FAMILIES[arch]


def _hf_name(path: Path, name: str, family: Family) -> str:
    """Hugging Face's name, with {} for the number of an expert where all lie in one tensor."""
    match name.split("."):
        case [stem, leaf] if stem in OUTER:
            return f"{OUTER[stem]}.{leaf}"
        case ["blk", layer, stem, leaf] if stem in family.names:
            return f"model.layers.{layer}.{family.names[stem]}.{leaf}"
        case ["blk", layer, stem, expert, leaf] if f"{stem}_exps" in family.names:  # older files
            module = family.names[f"{stem}_exps"].replace("{}", expert)
            return f"model.layers.{layer}.{module}.{leaf}"
    raise LorakitError(f"{path}: tensor {name} belongs to no {family.model_type} model")


def _experts(
    path: Path, name: str, info: TensorInfo, length: int, config: ModelConfig
) -> Iterator[TensorInfo]:
    """The tensors of the single experts, of which `info` [E, out, in] holds `length` bytes."""
    if len(info.shape) != 3 or info.shape[0] != config.num_experts or length == 0:
        raise LorakitError(
            f"{path}: tensor {name} is {info.shape}, not ({config.num_experts} experts, out, in)"
        )
    step = length // info.shape[0]
    for i in range(info.shape[0]):
        yield TensorInfo(info.shape[1:], info.kind, info.offset + i * step)


def _restoration(
    hf_name: str, family: Family, config: ModelConfig
) -> Callable[[Tensor], Tensor] | None:
    """What turns a tensor as it is stored into the published one, if they differ."""
    if family.permuted and "q_proj" in hf_name:
        return partial(_unpermute, heads=config.num_attention_heads)
    if family.permuted and "k_proj" in hf_name:
        return partial(_unpermute, heads=config.num_key_value_heads)
    if family.norm_offset and hf_name.endswith("norm.weight"):
        return lambda weight: weight - family.norm_offset
    return None


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows (head, pair, half) -> (head, half, pair): weight [heads * D, ...]."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, -1).transpose(1, 2).reshape(weight.shape)


def _model_config(path: Path, header: Header, family: Family) -> ModelConfig:
    metadata, tensors = header
    arch = metadata["general.architecture"]
    keys = {name: f"{arch}.{key}" for name, key in (KEYS | family.keys).items()} | TOKEN_KEYS
    values = {"rope_theta": 10000.0} | family.defaults
    values |= {name: metadata[key] for name, key in keys.items() if key in metadata}
    if "vocab_size" not in values and isinstance(metadata.get("tokenizer.ggml.tokens"), list):
        values["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    values["model_type"] = family.model_type
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values["attention_bias"] = "blk.0.attn_output.bias" in tensors  # Qwen2's others go by its type
    values["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors

    ends = [values.get("eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")]
    if None not in ends and ends[0] != ends[1]:  # the end of a turn, where that is another token
        values["eos_token_id"] = ends

    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if type(hidden) is int and type(heads) is int and heads > 0:
        values.setdefault("head_dim", hidden // heads)
        if family.full_width_layers is not None:
            full = values.get("num_hidden_layers") == family.full_width_layers
            values["query_pre_attn_scalar"] = hidden // heads if full else values["head_dim"]
    pattern = values.get("sliding_window_pattern")
    if isinstance(pattern, list):  # one entry per layer
        kinds = ("full_attention", "sliding_attention")
        values["layer_types"] = [kinds[bool(slides)] for slides in pattern]
        del values["sliding_window_pattern"]

    values["rope_scaling"] = _rope_scaling(path, metadata, f"{arch}.rope")
    if family.permuted and "rope_freqs.weight" in tensors:
        values["rope_scaling"] = _llama3_scaling(path, tensors["rope_freqs.weight"], values)
    config = ModelConfig.from_hf(values, str(path))
    rotated = metadata.get(f"{arch}.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise LorakitError(
            f"{path}: a rotary embedding of {rotated} of {config.head_dim} dimensions "
            "is not supported"
        )
    return config


def _rope_scaling(path: Path, metadata: dict[str, Any], prefix: str) -> dict[str, Any] | None:
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


def _llama3_scaling(path: Path, info: TensorInfo, values: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling is stored as divisors of the frequencies, not as its four parameters.

    Every published model uses 1, 4 and 8192 for the last three; the first is the largest divisor.
    That these four give the stored divisors is checked.
    """
    from lorakit.models.rope import inverse_frequencies

    plain = ModelConfig.from_hf(values, str(path))
    if info.shape != (plain.head_dim // 2,):
        raise LorakitError(
            f"{path}: rope_freqs.weight is {info.shape}, not ({plain.head_dim // 2},)"
        )
    divisors = numpy_reader(path, info, data_length(path, "rope_freqs.weight", info))()
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = ModelConfig.from_hf({**values, "rope_scaling": scaling}, str(path))
    size, cpu = plain.head_dim, torch.device("cpu")
    if not torch.allclose(
        inverse_frequencies(scaled.rope, size, cpu) * divisors,
        inverse_frequencies(plain.rope, size, cpu),
        rtol=1e-4,
    ):
        raise LorakitError(f"{path}: rope_freqs.weight holds a rotary scaling other than Llama 3's")
    return scaling
