"""Reading and writing."""

    @classmethod
    def from_hf(cls, values: Any, where: str = "config.json") -> "ModelConfig":
        """From the contents of a Hugging Face config.json, in transformers 4's or 5's spelling.

        Of a multimodal model the text tower is read. Keys that do not change the computation are
        ignored. Raises LorakitError, naming `where`, for an unknown model_type, a wrong type, a
        missing size, or a feature lorakit lacks.
        """
        if not isinstance(values, Mapping):
            raise LorakitError(f"{where} must hold a JSON object, not {type(values).__name__}")
        check("model_type" in values, f"{where}: model_type is missing")
        if str(values["model_type"]) in MULTIMODAL:
            values, where = _text_config(values, where), f"{where}, text_config"
        family = FAMILIES.get(str(values["model_type"]), Family(""))
        absent = {name for name in _NOT_NULL if values.get(name) is None}.union(family.ignored)
        values = family.defaults | {n: value for n, value in values.items() if n not in absent}
        _refuse_what_is_not_computed(values, where)
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values.get("num_attention_heads")
        if values.get("head_dim") is None:
            hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
            if type(hidden) is int and type(heads) is int and heads > 0:
                check(
                    hidden % heads == 0,
                    f"{where}: head_dim is not set, and hidden_size ({hidden}) is no multiple of "
                    f"num_attention_heads ({heads})",
                )
                values["head_dim"] = hidden // heads
        act = values.get(family.activation, "silu")
        values["hidden_act"] = family.activations.get(act, act) if isinstance(act, str) else act
        values["rope"], values["rope_local"] = _ropes_from_hf(values, where)
        values["qkv_bias"] = values["o_bias"] = values.get("attention_bias", False)
        values["sliding_layers"] = _sliding_layers(values, where)
        _read_experts(values, where)
        return from_mapping(cls, values | family.fields, where, ignore_unknown=True)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json in transformers 4's spelling, which every version reads."""
        family = FAMILIES[self.model_type]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rope, local = values.pop("rope"), values.pop("rope_local")
        sliding, experts = values.pop("sliding_layers"), values.pop("moe_layers")
        values["architectures"] = [family.architecture]
        values["attention_bias"] = values.pop("o_bias")
        values[family.activation] = self.hidden_act
        for name in (*family.fields, *_DERIVED):
            values.pop(name, None)
        for name in _OPTIONAL:
            if values[name] is None and name not in family.defaults:
                del values[name]
        if "sliding_window_pattern" in family.defaults:
            values["sliding_window_pattern"] = family.defaults["sliding_window_pattern"]
        elif "use_sliding_window" in family.defaults:
            values["use_sliding_window"] = any(sliding)
            values["max_window_layers"] = sliding.index(True) if any(sliding) else len(sliding)
        # layer_types only where the keys above do not say it: a Mistral that carries them is taken
        # for a Ministral
        if _sliding_layers(values, "") != sliding:
            names = list(LAYER_TYPES)
            kinds = sliding or [False] * self.num_hidden_layers
            values["layer_types"] = [names[slides] for slides in kinds]
        values["rope_theta"], values["rope_scaling"] = rope.rope_theta, _scaling_to_hf(rope)
        if rope.rope_type == "longrope":
            original = rope.original_max_position_embeddings
            values["original_max_position_embeddings"] = original
        if local is not None:
            values["rope_local_base_freq"] = local.rope_theta
            if local.rope_type != "default":  # version 4 has no key for it
                both = {"full_attention": rope, "sliding_attention": local}
                values["rope_parameters"] = {
                    kind: {"rope_theta": its.rope_theta} | (_scaling_to_hf(its) or {})
                    for kind, its in both.items()
                }
        if any(experts):
            _write_experts(self, values, experts)
        return values


_DERIVED = (
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
_NOT_NULL = ("rope_theta", "rope_local_base_freq", "sliding_window_pattern", "max_window_layers")
_NOT_NULL += ("hidden_act", "hidden_activation")
"""keys for which null means the family's default"""
_OPTIONAL = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")


def _text_config(values: Mapping, where: str) -> dict[str, Any]:
    text = values.get("text_config")
    if not isinstance(text, Mapping):
        raise LorakitError(
            f"{where}: model_type {values['model_type']!r} without a text_config: there is no "
            "text model in it"
        )
    outer = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    outer += ("quantization_config",)
    shared = {name: values[name] for name in outer if values.get(name) is not None}
    return shared | text | {"model_type": MULTIMODAL[values["model_type"]]}


def _refuse_what_is_not_computed(values: Mapping, where: str) -> None:
    quantization = values.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        # which tensors it packed the loader sees by their names
        check(
            method == "bitsandbytes",
            f"{where}: the checkpoint is already quantized ({method or 'quantization_config'}), "
            "which is not supported; load its 16-bit original",
        )
    check(
        not values.get("use_bidirectional_attention"),
        f"{where}: use_bidirectional_attention is not supported",
    )
    partial = values.get("partial_rotary_factor")
    check(
        partial is None or partial == 1,
        f"{where}: partial_rotary_factor {partial!r} is not supported; it must be 1",
    )


def _ropes_from_hf(values: Mapping, where: str) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embedding of all layers, and that of the sliding ones where it is another.

    transformers 5: one rope_parameters, or one per layer type; 4: rope_theta beside rope_scaling,
    which belongs to the full layers, and rope_local_base_freq for the sliding ones.
    """
    where = f"{where}, rope parameters"
    full = values.get("rope_scaling") or values.get("rope_parameters") or {}
    local = {}
    nested = values.get("rope_parameters")
    if isinstance(nested, Mapping) and any(name in nested for name in LAYER_TYPES):
        full, scaling = nested.get("full_attention") or {}, values.get("rope_scaling") or {}
        if isinstance(full, Mapping) and isinstance(scaling, Mapping):
            full = {**full, **scaling}
        local = nested.get("sliding_attention") or {}
    rope = _rope(full, values, values.get("rope_theta"), where)
    if "rope_local_base_freq" not in values:
        return rope, None
    return rope, _rope(local, values, values["rope_local_base_freq"], where)


def _rope(given: Any, values: Mapping, theta: Any, where: str) -> RopeConfig:
    if not isinstance(given, Mapping):
        raise LorakitError(f"{where} must be a mapping of names to values, not {given!r}")
    given = {name: value for name, value in given.items() if value is not None}
    given = {"rope_type": given.pop("type", "default")} | given
    kind, positions = given["rope_type"], values.get("max_position_embeddings")
    check(
        kind not in ("linear", "dynamic", "llama3") or "factor" in given,
        f"{where}: rope_type {kind!r} needs a factor",
    )
    check(
        given.get("partial_rotary_factor", 1) == 1,
        f"{where}: partial_rotary_factor {given.get('partial_rotary_factor')!r} is not supported",
    )
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


_SCALING_KEYS = {
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


def _scaling_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.rope_type == "default":
        return None
    values = {name: getattr(rope, name) for name in _SCALING_KEYS[rope.rope_type]}
    given = {name: value for name, value in values.items() if value is not None}
    return {"rope_type": rope.rope_type} | given


def _pattern(period: int, layers: int) -> list[bool]:
    """All slide but every `period`-th."""
    return [(i + 1) % period != 0 for i in range(layers)]


def _sliding_layers(values: Mapping, where: str) -> Any:
    """Which layers have a sliding window: layer_types, or what stood in its place before."""
    layers, window = values.get("num_hidden_layers"), values.get("sliding_window")
    if not values.get("use_sliding_window", True):
        return []
    if values.get("layer_types") is not None:
        kinds = values["layer_types"]
        if not isinstance(kinds, list) or not all(kind in LAYER_TYPES for kind in map(str, kinds)):
            raise LorakitError(
                f"{where}: layer_types must list {' or '.join(LAYER_TYPES)}, not {kinds!r}"
            )
        sliding = [LAYER_TYPES[kind] for kind in kinds]
        return sliding if any(sliding) else []
    if window is None or type(layers) is not int:
        return []
    count = min(layers, 10_000)
    period = values.get("sliding_window_pattern")
    if period is not None:
        check(
            type(period) is int and period > 0,
            f"{where}: sliding_window_pattern must be a positive number, not {period!r}",
        )
        sliding = _pattern(period, count)
        return sliding if any(sliding) else []
    # Mistral's window holds for all layers, Qwen's from max_window_layers on
    first = values.get("max_window_layers", 0)
    if type(first) is not int or first >= layers:
        return []
    return [i >= first for i in range(count)]


def _read_experts(values: dict[str, Any], where: str) -> None:
    """`num_experts` and which layers have them, under the names of Mixtral and of Qwen3-MoE."""
    defaults = FAMILIES.get(str(values["model_type"]), Family("")).defaults
    if "num_local_experts" not in defaults:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            values.pop(name, None)
        return
    values.setdefault("num_experts", values["num_local_experts"])
    if "moe_intermediate_size" not in defaults:  # Mixtral
        values["moe_intermediate_size"] = values.get("intermediate_size")
    layers, every = values.get("num_hidden_layers"), values.get("decoder_sparse_step", 1)
    dense = values.get("mlp_only_layers") or []
    check(type(every) is int and every > 0, f"{where}: decoder_sparse_step must be positive")
    check(isinstance(dense, list), f"{where}: mlp_only_layers must be a list, not {dense!r}")
    if type(layers) is int:
        values["moe_layers"] = [
            i not in dense and (i + 1) % every == 0 for i in range(min(layers, 10_000))
        ]


def _write_experts(config: ModelConfig, values: dict[str, Any], experts: list[bool]) -> None:
    defaults = FAMILIES[config.model_type].defaults
    values["num_experts_per_tok"] = config.num_experts_per_tok
    if "moe_intermediate_size" not in defaults:  # Mixtral
        values["num_local_experts"] = config.num_experts
        return
    values["num_experts"] = config.num_experts
    values["moe_intermediate_size"] = config.moe_intermediate_size
    values["norm_topk_prob"] = config.norm_topk_prob
    values["decoder_sparse_step"] = 1
    values["mlp_only_layers"] = [i for i, has in enumerate(experts) if not has]
