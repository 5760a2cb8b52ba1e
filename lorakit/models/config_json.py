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
from lorakit.models.classifier_json import read_classifier, write_classifier
from lorakit.models.families import FAMILIES, FLAT_WRAPPERS, WRAPPERS, family_of
from lorakit.models.family import Family
from lorakit.models.quantized_files.fold import check_method
from lorakit.models.rope_json import read_ropes, write_ropes

_SLIDES = {"full_attention": False, "sliding_attention": True}
"""Names in layer_types -> whether such a layer has the sliding window."""
_LINEAR = {"full_attention": False, "linear_attention": True}
"""Names in layer_types -> whether such a layer has linear attention."""
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
_INNER = (
    "o_bias",
    "qk_norm",
    "v_norm",
    "layer_scalar",
    "moe_beside_mlp",
    "fused_experts",
    "norm_weight_offset",
    "norm_casting_mode",
    "norm_placement",
    "scale_embeddings",
    "fused_qkv",
    "fused_gate_up",
    "attention_sinks",
    "attention_gate",
    "fused_qkvz",
    "moe_names",
    "router_name",
    "router_bias",
    "experts_transposed",
    "experts_interleaved",
    "moe_layers",
    "sliding_layers",
    "linear_layers",
    "rope_layers",
    "rope",
    "rope_local",
    "classifier",
)
"""Fields that follow from the family or from other keys; in a file such a key says nothing."""
_OF_SOME_FAMILIES = (
    "qkv_bias",
    "attention_out_bias",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "attention_multiplier",
    "shared_expert_intermediate_size",
    "partial_rotary_factor",
    "no_rope_layers",
    "no_rope_layer_interval",
    "global_head_dim",
    "num_global_key_value_heads",
    "attention_k_eq_v",
    "num_kv_shared_layers",
    "enable_moe_block",
    "use_double_wide_mlp",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "use_bidirectional_attention",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "full_attention_interval",
)
"""Keys that mean something only in files of families whose defaults list them."""
_OF_SWIGLU_OAI = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
"""Numbers of the activation of gpt-oss, as all published files say them."""
_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
"""Fields that `_write_experts` writes."""
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
    inside = {n: v for n, v in text.items() if v is not None or n != "quantization_config"}
    shared = {name: values[name] for name in beside if values.get(name) is not None}
    found = {**shared, **inside, "model_type": inner}
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
    _refuse_what_is_not_computed(config_json, family, where)
    ignored.update(family.ignored, _INNER)
    ignored.update(name for name in _OF_SOME_FAMILIES if name not in family.defaults)
    values = family.defaults | {n: v for n, v in config_json.items() if n not in ignored}
    _read_heads_of_full_layers(values, where)
    _complete_heads(values, where)
    act = values.get(family.activation, "silu")
    values["hidden_act"] = family.activations.get(act, act) if isinstance(act, str) else act
    values["rope"], values["rope_local"] = read_ropes(values, family, where)
    bias = values.get("attention_bias", False)
    values["qkv_bias"] = values.get("qkv_bias", bias)
    values["o_bias"] = values.get("attention_out_bias", bias)
    if values.get("sliding_window") == 0 and not values.get("use_sliding_window", True):
        values["sliding_window"] = None  # transformers writes 0 for a window that is switched off
    values["rope_layers"] = _read_rope_layers(values, where)
    if "full_attention_interval" in family.defaults:
        values["linear_layers"] = _read_linear_layers(values, where)
    else:
        values["sliding_layers"] = _read_sliding_layers(values, family, where)
    _read_experts(values, family, where)
    values["classifier"] = read_classifier(config_json, where)
    return values | family.fields


def _refuse_what_is_not_computed(values: Mapping[str, Any], family: Family, where: str) -> None:
    """Raise LorakitError if a file asks for a computation that lorakit does not have."""
    if values.get("quantization") is not None:
        raise LorakitError(
            f"{where}: MLX has quantized the model, which is not supported: load its 16-bit "
            "original, or what `mlx_lm.convert --dequantize` makes of it"
        )
    if values.get("quantization_config") is not None:
        check_method(values["quantization_config"], where)
    for name, value in _OF_SWIGLU_OAI.items():
        if family.fields.get("hidden_act") == "swiglu_oai" and values.get(name, value) != value:
            raise LorakitError(f"{where}: {name} {values[name]!r} is not supported, only {value}")
    bidirectional = values.get("use_bidirectional_attention")
    vision = "use_bidirectional_attention" in family.defaults and bidirectional == "vision"
    if bidirectional and not vision:  # text rows are causal where images are not
        raise LorakitError(f"{where}: use_bidirectional_attention is not supported")
    partial = values.get("partial_rotary_factor")
    if partial not in (None, 1) and "partial_rotary_factor" not in family.defaults:
        raise LorakitError(
            f"{where}: partial_rotary_factor {partial!r} is not supported; it must be 1"
        )


def _read_heads_of_full_layers(values: dict[str, Any], where: str) -> None:
    """Set the sizes of heads in layers without a window, as transformers 5 writes them.

    It writes `per_layer_config`, which holds both sizes for every such layer by its number, in the
    place of global_head_dim and num_global_key_value_heads.
    """
    given = values.get("per_layer_config")
    if given is None or "global_head_dim" not in values:
        return
    keys = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    said: Any = next(iter(given.values()), {}) if isinstance(given, Mapping) else None
    if not isinstance(said, Mapping) or any(each != said for each in given.values()):
        raise LorakitError(f"{where}: per_layer_config must say the same of all its layers")
    if not said.keys() <= keys.keys():
        raise LorakitError(
            f"{where}: per_layer_config names {', '.join(map(str, said))}; only "
            f"{' and '.join(keys)} may differ between layers"
        )
    values |= {keys[name]: value for name, value in said.items()}


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


def _read_rope_layers(values: Mapping[str, Any], where: str) -> list[bool]:
    """Return whether each layer has a rotary embedding; an empty list means that all have."""
    if "no_rope_layers" not in values:
        return []
    given, every = values["no_rope_layers"], values["no_rope_layer_interval"]
    layers = values.get("num_hidden_layers")
    if type(layers) is not int:
        return []
    if given is None:
        if type(every) is not int or every <= 0:
            raise LorakitError(f"{where}: no_rope_layer_interval must be positive, not {every!r}")
        given = [int((i + 1) % every != 0) for i in range(min(layers, _MOST_LAYERS))]
    if not isinstance(given, list) or not all(each in (0, 1) for each in given):
        raise LorakitError(f"{where}: no_rope_layers must list 0 or 1, not {given!r}")
    turns = [bool(each) for each in given[:layers]]
    return [] if all(turns) and len(turns) == layers else turns


def _read_sliding_layers(values: Mapping[str, Any], family: Family, where: str) -> list[bool]:
    """Return whether each layer has the sliding window, from layer_types or the older keys."""
    if not values.get("use_sliding_window", True):
        return []
    sliding = _read_layer_types(values, _SLIDES, where)
    if sliding is not None:
        if family.last_is_full:
            sliding[-1:] = [False] * len(sliding[-1:])
        return _or_none(sliding)
    layers, period = values.get("num_hidden_layers"), values.get("sliding_window_pattern")
    if values.get("sliding_window") is None or type(layers) is not int:
        return []
    numbers = range(min(layers, _MOST_LAYERS))
    if period is not None:
        if type(period) is not int or period <= 0:
            raise LorakitError(
                f"{where}: sliding_window_pattern must be a positive number, not {period!r}"
            )
        last = layers - 1 if family.last_is_full else layers
        return _or_none([(i + 1) % period != 0 and i != last for i in numbers])
    if "no_rope_layers" in values:  # SmolLM3 has the window where it has no rotary embedding
        return _or_none([not turns for turns in values["rope_layers"]])
    first = values.get("max_window_layers", 0)
    return _or_none([family.slides(i, first) for i in numbers]) if type(first) is int else []


def _read_linear_layers(values: Mapping[str, Any], where: str) -> list[bool]:
    """Return whether each layer has linear attention, from layer_types or the interval."""
    linear, every = _read_layer_types(values, _LINEAR, where), values["full_attention_interval"]
    if linear is not None:
        return _or_none(linear)
    if type(every) is not int or every <= 0:
        raise LorakitError(f"{where}: full_attention_interval must be positive, not {every!r}")
    layers = values.get("num_hidden_layers")
    numbers = range(min(layers, _MOST_LAYERS)) if type(layers) is int else []
    return _or_none([(i + 1) % every != 0 for i in numbers])


def _read_layer_types(
    values: Mapping[str, Any], meanings: Mapping[str, bool], where: str
) -> list[bool] | None:
    """Return what the names in layer_types mean, or None where a file has none."""
    kinds = values.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or not all(str(kind) in meanings for kind in kinds):
        raise LorakitError(f"{where}: layer_types must list {' or '.join(meanings)}, not {kinds!r}")
    return [meanings[kind] for kind in kinds]


def _layer_types(layers: list[bool], count: int, meanings: Mapping[str, bool]) -> list[str]:
    """Return the names in layer_types of `count` layers; an empty list: none of them is meant."""
    names = {meaning: name for name, meaning in meanings.items()}
    return [names[each] for each in layers or [False] * count]


def _or_none(layers: list[bool]) -> list[bool]:
    """Return an empty list where no layer is meant: ModelConfig has one way to say so."""
    return layers if any(layers) else []


def _read_experts(values: dict[str, Any], family: Family, where: str) -> None:
    """Set `num_experts` and `moe_layers`, from the keys of Mixtral, Qwen3-MoE or Gemma 4."""
    if values.get("enable_moe_block"):  # Gemma 4 has them in all layers, or in none
        values["num_experts_per_tok"] = values["top_k_experts"]
        if type(values.get("num_hidden_layers")) is int:
            values["moe_layers"] = [True] * min(values["num_hidden_layers"], _MOST_LAYERS)
        return
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
    rope, local, head = (values.pop(name) for name in ("rope", "rope_local", "classifier"))
    sliding, experts = values.pop("sliding_layers"), values.pop("moe_layers")
    linear = values.pop("linear_layers")
    values["architectures"] = [family.architecture]
    values |= {} if head is None else write_classifier(head, family)
    values["attention_bias"] = fields["o_bias"]
    if "attention_out_bias" in family.defaults:
        values |= {"attention_bias": fields["qkv_bias"], "attention_out_bias": fields["o_bias"]}
    if "no_rope_layers" in family.defaults:
        turns = fields["rope_layers"] or [True] * fields["num_hidden_layers"]
        values["no_rope_layers"] = [int(each) for each in turns]
        values["no_rope_layer_interval"] = family.defaults["no_rope_layer_interval"]
    values[family.activation] = fields["hidden_act"]
    inner = [name for name in _INNER if name != "rope_layers"]
    unknown = [name for name in _OF_SOME_FAMILIES if name not in family.defaults]
    for name in (*family.fields, *inner, *unknown, *_OF_EXPERTS):
        values.pop(name, None)
    for name in _LEFT_OUT_IF_NULL:
        if values[name] is None and name not in family.defaults:
            del values[name]
    if "full_attention_interval" in family.defaults:
        values["layer_types"] = _layer_types(linear, fields["num_hidden_layers"], _LINEAR)
    else:
        _write_sliding_layers(values, sliding, family)
    del values["rope_layers"]
    write_ropes(values, rope, local, family)
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
    if _read_sliding_layers(values, family, "") != sliding:
        values["layer_types"] = _layer_types(sliding, values["num_hidden_layers"], _SLIDES)


def _write_experts(values: dict[str, Any], fields: Mapping[str, Any], family: Family) -> None:
    """Write the keys of the experts, under the names of Mixtral, Qwen3-MoE or Gemma 4."""
    if "enable_moe_block" in family.defaults:
        values["enable_moe_block"], values["top_k_experts"] = True, fields["num_experts_per_tok"]
        values |= {name: fields[name] for name in ("num_experts", "moe_intermediate_size")}
        return
    values["num_experts_per_tok"] = fields["num_experts_per_tok"]
    if "moe_intermediate_size" not in family.defaults:  # Mixtral
        values["num_local_experts"] = fields["num_experts"]
        return
    for name in ("num_experts", "moe_intermediate_size", "norm_topk_prob"):
        values[name] = fields[name]
    values["decoder_sparse_step"] = 1
    values["mlp_only_layers"] = [i for i, has in enumerate(fields["moe_layers"]) if not has]
