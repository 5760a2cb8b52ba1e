"""Translate between the keys of a Hugging Face config.json and the fields of `ModelConfig`.

Both spellings are read: that of transformers 4 (`rope_theta` beside `rope_scaling`, `torch_dtype`,
`sliding_window_pattern`) and that of 5 (`rope_parameters`, nested by layer type for Gemma 3, and
`layer_types`). The older one is written, because every version reads it.

The defaults of keys that a file leaves out, and some names, depend on the file's `model_type`.
families.py lists them.
"""

from collections.abc import Mapping
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.config.fields import from_mapping
from lorakit.models.families import FAMILIES, FLAT_WRAPPERS, WRAPPERS, Family, family_of
from lorakit.models.rope import RopeConfig

_SLIDES = {"full_attention": False, "sliding_attention": True}
"""Names in layer_types -> whether such a layer has the sliding window."""
_NULL_IS_DEFAULT = (
    "rope_theta",
    "rope_local_base_freq",
    "sliding_window_pattern",
    "max_window_layers",
    "hidden_act",
    "hidden_activation",
)
"""Keys for which null means the family's default."""
_LEFT_OUT_IF_NULL = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
"""Fields that are not written where they are None, unless the family has them."""
_NOT_WRITTEN = (
    "qkv_bias",
    "qk_norm",
    "norm_weight_offset",
    "norm_casting_mode",
    "sandwich_norm",
    "scale_embeddings",
    "moe_names",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
)
"""Fields that follow from the family or from other keys, or are written by `_write_experts`."""
_MOST_LAYERS = 10_000
"""Length at which lists per layer end; a damaged file may ask for more layers than memory holds."""


# ---- reading ----


def text_config(values: Any, where: str) -> tuple[Mapping[str, Any], str]:
    """Return the part of a config.json that describes the text model, and its name for messages.

    The whole file does, except for a multimodal model: there `text_config` does, together with the
    keys that transformers takes from beside it. Files of Qwen2-VL and Qwen2.5-VL have these keys
    in the whole file too.

    Raises:
        LorakitError: If the file holds no JSON object, no model_type, none that lorakit has, or no
            text model.
    """
    if not isinstance(values, Mapping):
        raise LorakitError(f"{where} must hold a JSON object, not {type(values).__name__}")
    if "model_type" not in values:
        raise LorakitError(f"{where}: model_type is missing")
    outer = values["model_type"]
    if not isinstance(outer, str) or outer not in WRAPPERS:
        _check_family(outer, None, where)
        return values, where
    inner, text = WRAPPERS[outer], values.get("text_config")
    if text is None and is_flat(values):
        return {**values, "model_type": inner}, where
    if not isinstance(text, Mapping):
        raise LorakitError(
            f"{where}: model_type {outer!r} without a text_config: there is no text model in it"
        )
    inner = text.get("model_type", inner)
    _check_family(inner, outer, where)
    beside = ["bos_token_id", "eos_token_id", "pad_token_id", "quantization", "quantization_config"]
    shared = {name: values[name] for name in beside if values.get(name) is not None}
    found = {**shared, **text, "model_type": inner}
    # Either place may say that head and embedding are one, depending on what wrote the file.
    ties = [each.get("tie_word_embeddings") for each in (text, values)]
    ties = [tie for tie in ties if tie is not None]
    found.pop("tie_word_embeddings", None)
    if ties:
        found["tie_word_embeddings"] = next(filter(None, ties), ties[0])
    return found, f"{where}, text_config"


def is_flat(values: Mapping[str, Any]) -> bool:
    """Return whether the config.json of a wrapper has the text model's keys beside its own."""
    return values["model_type"] in FLAT_WRAPPERS and values.get("text_config") is None


def _check_family(model_type: Any, around: str | None, where: str) -> None:
    try:
        family_of(model_type, around)
    except LorakitError as error:
        raise LorakitError(f"{where}: {error}") from None


def fields_from_hf(config_json: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that a config.json gives.

    The result still holds the file's other keys. Types and sizes are not checked here. Raises
    LorakitError, naming the file `where`, if the file asks for a computation that lorakit does not
    have, or says something that cannot be translated.
    """
    family = FAMILIES[config_json["model_type"]]
    ignored = {name for name in _NULL_IS_DEFAULT if config_json.get(name) is None}
    ignored.update(family.ignored)
    values = family.defaults | {n: v for n, v in config_json.items() if n not in ignored}
    _refuse_what_is_not_computed(values, where)
    _complete_heads(values, where)
    act = values.get(family.activation, "silu")
    values["hidden_act"] = family.activations.get(act, act) if isinstance(act, str) else act
    values["rope"], values["rope_local"] = _read_ropes(values, family, where)
    values["qkv_bias"] = values["o_bias"] = values.get("attention_bias", False)
    values["sliding_layers"] = _read_sliding_layers(values, where)
    _read_experts(values, family, where)
    return values | family.fields


def _refuse_what_is_not_computed(values: Mapping[str, Any], where: str) -> None:
    """Raise LorakitError if a file asks for a computation that lorakit does not have."""
    if values.get("quantization") is not None:
        raise LorakitError(
            f"{where}: MLX has quantized the model, which is not supported: load its 16-bit "
            "original, or what `mlx_lm.convert --dequantize` makes of it"
        )
    quantization = values.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        if method != "bitsandbytes":  # the loader finds its packed tensors by their names
            raise LorakitError(
                f"{where}: the model is already quantized "
                f"({method or 'quantization_config'}), which is not supported; load its 16-bit "
                "original"
            )
    if values.get("use_bidirectional_attention"):
        raise LorakitError(f"{where}: use_bidirectional_attention is not supported")
    partial = values.get("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise LorakitError(
            f"{where}: partial_rotary_factor {partial!r} is not supported; it must be 1"
        )


def _complete_heads(values: dict[str, Any], where: str) -> None:
    """Fill in num_key_value_heads and head_dim, which a file may leave out."""
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is not None:
        return
    values.pop("head_dim", None)
    if type(hidden) is int and type(heads) is int and heads > 0:
        if hidden % heads:
            raise LorakitError(
                f"{where}: head_dim is not set, and hidden_size ({hidden}) is no multiple of "
                f"num_attention_heads ({heads})"
            )
        values["head_dim"] = hidden // heads


def _read_ropes(
    values: Mapping[str, Any], family: Family, where: str
) -> tuple[RopeConfig, RopeConfig | None]:
    """Return the rotary embedding of all layers, and that of the sliding ones if it is another.

    transformers 5 writes one rope_parameters, or one per layer type. transformers 4 writes
    rope_theta beside rope_scaling, which belongs to the full layers, and rope_local_base_freq for
    the sliding ones.
    """
    where = f"{where}, rope parameters"
    full = values.get("rope_scaling") or values.get("rope_parameters") or {}
    local: Any = {}
    nested = values.get("rope_parameters")
    if isinstance(nested, Mapping) and any(name in nested for name in _SLIDES):
        full, scaling = nested.get("full_attention") or {}, values.get("rope_scaling") or {}
        if isinstance(full, Mapping) and isinstance(scaling, Mapping):
            full = {**full, **scaling}
        local = nested.get("sliding_attention") or {}
    rope = _read_rope(full, values, family, values.get("rope_theta"), where)
    if "rope_local_base_freq" not in values:
        return rope, None
    return rope, _read_rope(local, values, family, values["rope_local_base_freq"], where)


def _read_rope(
    given: Any, values: Mapping[str, Any], family: Family, theta: Any, where: str
) -> RopeConfig:
    """Read one rotary embedding from its keys `given`, the file's `values` and a default theta."""
    if not isinstance(given, Mapping):
        raise LorakitError(f"{where} must be a mapping of names to values, not {given!r}")
    given = {name: value for name, value in given.items() if value is not None}
    given = {"rope_type": given.pop("type", "default")} | given
    if isinstance(given["rope_type"], str):
        given["rope_type"] = family.rope_types.get(given["rope_type"], given["rope_type"])
    kind, positions = given["rope_type"], values.get("max_position_embeddings")
    if kind in ("linear", "dynamic", "llama3") and "factor" not in given:
        raise LorakitError(f"{where}: rope_type {kind!r} needs a factor")
    if (partial := given.get("partial_rotary_factor", 1)) != 1:
        raise LorakitError(f"{where}: partial_rotary_factor {partial!r} is not supported")
    if theta is not None:
        given.setdefault("rope_theta", theta)
    if kind == "dynamic":  # the context before stretching is the model's own
        given.pop("original_max_position_embeddings", None)
    if kind in ("dynamic", "yarn", "longrope", "llama3") and positions is not None:
        beside = values.get("original_max_position_embeddings")
        given.setdefault("original_max_position_embeddings", beside or positions)
        original = given["original_max_position_embeddings"]
        numbers = type(original) is int and type(positions) is int and original > 0
        if kind in ("yarn", "longrope") and "factor" not in given and numbers:
            given["factor"] = positions / original
    return from_mapping(RopeConfig, given, where, ignore_unknown=True)


def _read_sliding_layers(values: Mapping[str, Any], where: str) -> list[bool]:
    """Return whether each layer has the sliding window, from layer_types or the older keys."""
    if not values.get("use_sliding_window", True):
        return []
    kinds = values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or not all(str(kind) in _SLIDES for kind in kinds):
            raise LorakitError(
                f"{where}: layer_types must list {' or '.join(_SLIDES)}, not {kinds!r}"
            )
        return _or_none([_SLIDES[kind] for kind in kinds])
    layers, period = values.get("num_hidden_layers"), values.get("sliding_window_pattern")
    if values.get("sliding_window") is None or type(layers) is not int:
        return []
    numbers = range(min(layers, _MOST_LAYERS))
    if period is not None:
        if type(period) is not int or period <= 0:
            raise LorakitError(
                f"{where}: sliding_window_pattern must be a positive number, not {period!r}"
            )
        return _or_none([(i + 1) % period != 0 for i in numbers])
    # Mistral's window holds for all layers, Qwen's from max_window_layers on
    first = values.get("max_window_layers", 0)
    if type(first) is not int or first >= layers:
        return []
    return [i >= first for i in numbers]


def _or_none(sliding: list[bool]) -> list[bool]:
    """Return an empty list where no layer slides: ModelConfig has one way to say so."""
    return sliding if any(sliding) else []


def _read_experts(values: dict[str, Any], family: Family, where: str) -> None:
    """Set `num_experts` and `moe_layers`, from the keys of Mixtral or of Qwen3-MoE."""
    if "num_local_experts" not in family.defaults:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            values.pop(name, None)
        return
    values.setdefault("num_experts", values["num_local_experts"])
    if "moe_intermediate_size" not in family.defaults and "intermediate_size" in values:  # Mixtral
        values["moe_intermediate_size"] = values["intermediate_size"]
    layers, every = values.get("num_hidden_layers"), values.get("decoder_sparse_step", 1)
    dense = values.get("mlp_only_layers") or []
    if type(every) is not int or every <= 0:
        raise LorakitError(f"{where}: decoder_sparse_step must be positive")
    if not isinstance(dense, list):
        raise LorakitError(f"{where}: mlp_only_layers must be a list, not {dense!r}")
    if type(layers) is int:
        numbers = range(min(layers, _MOST_LAYERS))
        values["moe_layers"] = [i not in dense and (i + 1) % every == 0 for i in numbers]


# ---- writing ----


def fields_to_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a config.json that says what the fields of a `ModelConfig` say."""
    family = FAMILIES[fields["model_type"]]
    values = dict(fields)
    rope, local = values.pop("rope"), values.pop("rope_local")
    sliding, experts = values.pop("sliding_layers"), values.pop("moe_layers")
    values["architectures"] = [family.architecture]
    values["attention_bias"] = values.pop("o_bias")
    values[family.activation] = fields["hidden_act"]
    for name in (*family.fields, *_NOT_WRITTEN):
        values.pop(name, None)
    for name in _LEFT_OUT_IF_NULL:
        if values[name] is None and name not in family.defaults:
            del values[name]
    _write_sliding_layers(values, sliding, family)
    _write_ropes(values, rope, local)
    if any(experts):
        _write_experts(values, fields, family)
    return values


def _write_sliding_layers(values: dict[str, Any], sliding: list[bool], family: Family) -> None:
    """Write the older keys, and layer_types only if these keys do not say it all.

    layer_types is not written always because a Mistral that carries it is taken for a Ministral.
    """
    if "sliding_window_pattern" in family.defaults:
        values["sliding_window_pattern"] = family.defaults["sliding_window_pattern"]
    elif "use_sliding_window" in family.defaults:
        values["use_sliding_window"] = any(sliding)
        values["max_window_layers"] = sliding.index(True) if any(sliding) else len(sliding)
    if _read_sliding_layers(values, "") != sliding:
        names = {slides: name for name, slides in _SLIDES.items()}
        layers = sliding or [False] * values["num_hidden_layers"]
        values["layer_types"] = [names[slides] for slides in layers]


_SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""The keys of rope_scaling for each rope_type."""


def _write_ropes(values: dict[str, Any], rope: RopeConfig, local: RopeConfig | None) -> None:
    """Write the rotary embedding of all layers, and the sliding layers' own if there is one."""
    values["rope_theta"], values["rope_scaling"] = rope.rope_theta, _scaling(rope)
    if rope.rope_type == "longrope":
        original = rope.original_max_position_embeddings
        values["original_max_position_embeddings"] = original
    if local is None:
        return
    values["rope_local_base_freq"] = local.rope_theta
    if local.rope_type != "default":  # version 4 has no key for it
        both = {"full_attention": rope, "sliding_attention": local}
        values["rope_parameters"] = {
            kind: {"rope_theta": each.rope_theta} | (_scaling(each) or {})
            for kind, each in both.items()
        }


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """Return the value of rope_scaling, or None if it would say nothing."""
    names = [*_SCALING_KEYS[rope.rope_type], "mrope_section", "mrope_interleaved"]
    values = {name: getattr(rope, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    return {"rope_type": rope.rope_type} | given if given else None


def _write_experts(values: dict[str, Any], fields: Mapping[str, Any], family: Family) -> None:
    """Write the keys of the experts, under the names of Mixtral or of Qwen3-MoE."""
    values["num_experts_per_tok"] = fields["num_experts_per_tok"]
    if "moe_intermediate_size" not in family.defaults:  # Mixtral
        values["num_local_experts"] = fields["num_experts"]
        return
    for name in ("num_experts", "moe_intermediate_size", "norm_topk_prob"):
        values[name] = fields[name]
    values["decoder_sparse_step"] = 1
    values["mlp_only_layers"] = [i for i, has in enumerate(fields["moe_layers"]) if not has]
