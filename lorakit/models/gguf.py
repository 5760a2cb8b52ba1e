"""GGUF files as models: the config and the published weights that a file stands for.

files/gguf.py reads the container. Here its names, keys and values become Hugging Face's, by the
tables of gguf_names.py. What differs from the published weights is undone as a tensor is read: the
order of rows in `llama` files, the offset of Gemma's norms. Each expert is a tensor of its own
here, and reading it reads its bytes alone.

A file leaves some things unsaid. For these lorakit computes what llama.cpp does: Gemma's attention
scale goes by the number of layers, Qwen has no sliding window, Qwen3-MoE's expert weights sum to
one, every fourth layer of SmolLM3 knows no positions. Phi 3's window, which llama.cpp ignores, is
kept.

Metadata of a wrong type, sizes that do not fit each other, and tensors that the architecture does
not have raise a LorakitError. Nothing that a file says is believed without a check.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.files.gguf import (
    Header,
    TensorInfo,
    data_length,
    fp32_reader,
    read_header,
    rows_reader,
)
from lorakit.files.safetensors import LazyTensor
from lorakit.models.config import ModelConfig, RopeConfig
from lorakit.models.gguf_gemma4 import gemma4_layers
from lorakit.models.gguf_linear import MOVES_COLUMNS, joined
from lorakit.models.gguf_names import (
    DIALECTS,
    KEYS,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    TOKEN_KEYS,
    Dialect,
    published_name,
    published_shape,
    restoration,
)
from lorakit.models.rope import llama3_of_divisors

_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_PREDICT = "nextn_predict_layers"  # behind the others; they draft tokens, and are not read
_MOST_DRAFTS = 64
_ROTARY = ("rope_freqs.weight", _SHORT, _LONG)


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
    tensors: dict[str, LazyTensor] = {}
    layers = config.num_hidden_layers
    predict = header.metadata.get(f"{header.metadata['general.architecture']}.{_PREDICT}")
    drafts = range(min(predict, _MOST_DRAFTS)) if type(predict) is int else ()
    more = tuple(f"blk.{layers + i}." for i in drafts)
    for name, info in header.tensors.items():
        if name in _ROTARY or name.startswith(more):  # in the config already, or drafts
            continue
        hf_name = _hf_name(path, name, dialect)
        if "{}" in hf_name:
            tensors |= _expert_tensors(path, name, hf_name, info, lengths[name], config)
        else:
            info = info._replace(shape=published_shape(hf_name, info.shape))
            read = fp32_reader(path, info, lengths[name])
            restore = restoration(hf_name, dialect, config)
            rows = None
            if restore is not None:
                read = partial(_restored, read, restore)
            elif len(info.shape) == 2:
                rows = rows_reader(path, info, lengths[name])
            tensors[hf_name] = LazyTensor(info.shape, read, read_rows=rows)
    return config, joined(tensors, config)


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
    restore = None if config is None else restoration(published, dialect, config)
    if restore is not None and published.endswith(f"{MOVES_COLUMNS}.weight"):
        raise LorakitError(f"{path}: an adapter of {name}, whose columns are moved, is not read")
    return published, restore


def _dialect(path: Path, header: Header) -> Dialect:
    """Return the dialect of a file's architecture; refuse an architecture that has none."""
    arch = header.metadata.get("general.architecture")
    if arch not in list(DIALECTS):  # a list: a damaged file may hold what cannot be hashed
        known = ", ".join(DIALECTS)
        raise LorakitError(f"{path}: architecture {arch!r} is not supported; supported are {known}")
    experts = any("_exps." in name or "_gate_inp." in name for name in header.tensors)
    if arch == "llama" and (experts or header.metadata.get("llama.expert_count")):
        return MIXTRAL
    if arch == "mistral3" and "mistral3.attention.temperature_scale" not in header.metadata:
        return MISTRAL
    if arch == "olmo2" and not header.metadata.get("olmo2.attention.sliding_window"):
        return OLMO2
    return DIALECTS[arch]


# ---- tensors ------------------------------------------------------------------------------------


def _hf_name(path: Path, name: str, dialect: Dialect) -> str:
    """Return the Hugging Face name of a tensor, with {} for the number of each expert in it."""
    published = published_name(name, dialect)
    if published is None:
        raise LorakitError(f"{path}: tensor {name} belongs to no {dialect.model_type} model")
    return published


def _expert_tensors(
    path: Path, name: str, hf_name: str, info: TensorInfo, length: int, config: ModelConfig
) -> dict[str, LazyTensor]:
    """Return the layers of the single experts; `info` [E, out, in] holds `length` bytes of them.

    "+" in `hf_name` stands between the layers that lie in one, the rows of one behind the other's.
    """
    prefix, _, rest = hf_name.partition("{}.")
    names, _, leaf = rest.rpartition(".")
    layers, count = names.split("+"), config.num_experts
    parts = count * len(layers)
    dims = 2 if leaf == "bias" else 3
    wrong = len(info.shape) != dims or info.shape[0] != count or length == 0
    if wrong or info.shape[1] % len(layers):
        raise LorakitError(f"{path}: tensor {name} is {info.shape}, not ({count} experts, out, in)")
    step, shape = length // parts, (info.shape[1] // len(layers), *info.shape[2:])
    found = {}
    for i in range(parts):
        read = fp32_reader(path, TensorInfo(shape, info.kind, info.offset + i * step), step)
        expert, layer = divmod(i, len(layers))
        found[f"{prefix}{expert}.{layers[layer]}.{leaf}"] = LazyTensor(shape, read)
    return found


def _restored(read: Callable[[], Tensor], restore: Callable[[Tensor], Tensor]) -> Tensor:
    return restore(read())


# ---- the config ---------------------------------------------------------------------------------


def _model_config(path: Path, header: Header, dialect: Dialect) -> ModelConfig:
    """Return the config that the metadata and the names of the tensors describe."""
    arch = header.metadata["general.architecture"]
    values = _given_values(header.metadata, arch, dialect)
    _add_what_tensors_say(values, header.tensors)
    if arch == "gemma4":
        gemma4_layers(values, header.tensors)
        theta, local = values["rope_theta"], values.get("rope_local_base_freq", 10000.0)
        values["rope_parameters"] = {
            "full_attention": _proportional(path, header) | {"rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    _add_derived_values(values, dialect)
    _add_linear_attention(values, header.metadata, arch)
    values["rope_scaling"] = _rope_scaling(path, header, arch)
    sections = header.metadata.get(f"{arch}.rope.dimension_sections")
    if isinstance(sections, list):  # of the positions of images, padded to four
        kept = {"mrope_section": [n for n in sections if n], "mrope_interleaved": True}
        values["rope_scaling"] = {"rope_type": "default"} | (values["rope_scaling"] or {}) | kept
    size = values.get("head_dim")
    turned = header.metadata.get(f"{arch}.rope.dimension_count", size)
    if dialect.partial and type(turned) is int and type(size) is int and size > 0:
        values["partial_rotary_factor"] = turned / size
    config = ModelConfig.from_hf(values, str(path))
    if arch == "gemma4":  # whose rotary embeddings are read and checked above
        return config
    if "rope_freqs.weight" in header.tensors:
        rope = _llama3_rope(path, header.tensors["rope_freqs.weight"], config)
        config = dataclasses.replace(config, rope=rope)
    if turned != config.rope.rotary_dim(config.head_dim):
        raise LorakitError(
            f"{path}: a rotary embedding of {turned} of {config.head_dim} dimensions "
            "is not supported"
        )
    return config


def _given_values(metadata: Mapping[str, Any], arch: str, dialect: Dialect) -> dict[str, Any]:
    """Return config.json's values that the metadata holds under other keys, and the defaults."""
    keys = {name: f"{arch}.{key}" for name, key in {**KEYS, **dialect.keys}.items()} | TOKEN_KEYS
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
    # the other biases of Qwen2 and Seed-OSS go by the type
    values.setdefault("attention_bias", "blk.0.attn_output.bias" in tensors)
    values["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors


def _add_derived_values(values: dict[str, Any], dialect: Dialect) -> None:
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
    if values.get("sliding_window") == 0:  # of Phi 4
        values["sliding_window"] = None


def _add_linear_attention(values: dict[str, Any], metadata: Mapping[str, Any], arch: str) -> None:
    """Add what follows from other keys for models with linear attention, and the layers."""
    heads, inner = values.get("linear_num_value_heads"), metadata.get(f"{arch}.ssm.inner_size")
    if type(heads) is int and type(inner) is int and heads > 0:
        values["linear_value_head_dim"] = inner // heads
    more, layers = metadata.get(f"{arch}.{_PREDICT}"), values.get("num_hidden_layers")
    if type(more) is int and type(layers) is int:
        values["num_hidden_layers"] = layers - more


def _rope_scaling(path: Path, header: Header, arch: str) -> dict[str, Any] | None:
    """Return config.json's rope_scaling, or None if the frequencies are the plain ones."""
    metadata, prefix = header.metadata, f"{arch}.rope"
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    factor = metadata.get(f"{prefix}.scaling.factor", metadata.get(f"{prefix}.scale_linear", 0.0))
    keys = {
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    given = {name: metadata.get(f"{prefix}.scaling.{key}") for name, key in keys.items()}
    if _LONG in header.tensors:
        given |= {"rope_type": "longrope", **_longrope_factors(path, header)}
        return given | {"attention_factor": metadata.get(f"{prefix}.scaling.attn_factor")}
    if kind == "none" or (kind == "linear" and factor == 0):
        return None
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if metadata.get(f"{prefix}.scaling.{key}", 1.0) != 1:
            raise LorakitError(f"{path}: {prefix}.scaling.{key} is not supported; it must be 1")
    multiplier = metadata.get(f"{prefix}.scaling.yarn_log_multiplier")
    if multiplier is not None:  # llama.cpp then takes 1 for the other
        given |= {"mscale": 1.0, "mscale_all_dim": multiplier}
    beta = metadata.get(f"{arch}.attention.temperature_scale")
    if arch == "gpt-oss":  # as published
        given["truncate"] = False
    return {"rope_type": kind, "factor": factor or 1.0, "llama_4_scaling_beta": beta} | given


def _proportional(path: Path, header: Header) -> dict[str, Any]:
    """Return Gemma 4's rotary embedding of the full layers, of which a share of the pairs turns."""
    info = header.tensors.get("rope_freqs.weight")
    if info is None:
        return {"rope_type": "default"}
    divisors = fp32_reader(path, info, data_length(path, "rope_freqs.weight", info))()
    turning = divisors.flatten() == 1
    count = int(turning.sum())
    if not turning[:count].all() or not (divisors.flatten()[count:] >= 1e20).all():
        raise LorakitError(f"{path}: rope_freqs.weight must be 1, and 1e30 from some pair on")
    return {"rope_type": "proportional", "partial_rotary_factor": count / len(turning)}


def _longrope_factors(path: Path, header: Header) -> dict[str, Any]:
    """Return the divisors of longrope, which files store as two tensors."""
    found = {}
    for key, name in (("short_factor", _SHORT), ("long_factor", _LONG)):
        info = header.tensors.get(name)
        if info is None or len(info.shape) != 1:
            raise LorakitError(f"{path}: tensor {name} is missing, or no vector")
        found[key] = fp32_reader(path, info, data_length(path, name, info))().tolist()
    return found


def _llama3_rope(path: Path, info: TensorInfo, config: ModelConfig) -> RopeConfig:
    """Return the rotary embedding that the divisors of the frequencies at `info` stand for.

    Files store Llama 3's scaling as these divisors, not as its four parameters. A file whose
    divisors follow from no four is refused.
    """
    size = config.head_dim
    if info.shape != (size // 2,):
        raise LorakitError(f"{path}: rope_freqs.weight is {info.shape}, not ({size // 2},)")
    divisors = fp32_reader(path, info, data_length(path, "rope_freqs.weight", info))()
    found = llama3_of_divisors(divisors, config.rope.rope_theta)
    if found is None:
        raise LorakitError(f"{path}: rope_freqs.weight holds a rotary scaling other than Llama 3's")
    return found
