"""The rotary embeddings of a config.json: read in both spellings of transformers, and written.

transformers 4 has `rope_theta` beside `rope_scaling`. transformers 5 has one `rope_parameters`, or
one for each kind of layers in it. The older spelling is written, except where it cannot say what is
meant.
"""

from collections.abc import Mapping
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.config.fields import from_mapping
from lorakit.models.family import Family
from lorakit.models.rope import RopeConfig

_KINDS = ("full_attention", "sliding_attention")


def read_ropes(
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
    if isinstance(nested, Mapping) and any(name in nested for name in _KINDS):
        full, scaling = nested.get("full_attention") or {}, values.get("rope_scaling") or {}
        if isinstance(full, Mapping) and isinstance(scaling, Mapping):
            full = {**full, **scaling}
        local = nested.get("sliding_attention") or {}
    rope = _read_rope(full, values, family, values.get("rope_theta"), where)
    if "rope_local_base_freq" not in values:
        return rope, None
    theta = values["rope_local_base_freq"] or values.get("rope_theta")
    return rope, _read_rope(local, values, family, theta, where)


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
    if "partial_rotary_factor" in family.defaults:
        given.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    elif (partial := given.get("partial_rotary_factor", 1)) != 1 and kind != "proportional":
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
    "proportional": ("factor", "partial_rotary_factor"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""The keys of rope_scaling for each rope_type."""


_BESIDE_SCALING = ("mrope_section", "mrope_interleaved", "llama_4_scaling_beta")
"""Keys of rope_scaling that any rope_type may have."""


def write_ropes(
    values: dict[str, Any], rope: RopeConfig, local: RopeConfig | None, family: Family
) -> None:
    """Write the rotary embedding of all layers, and the sliding layers' own if there is one."""
    by_kind = {"full_attention": rope, "sliding_attention": local}
    nested = {
        kind: {"rope_theta": each.rope_theta, "rope_type": each.rope_type} | (_scaling(each) or {})
        for kind, each in by_kind.items()
        if each is not None
    }
    if "rope_parameters" in family.defaults and local is not None:
        values["rope_parameters"] = nested
        return
    if "rope_parameters" in family.defaults:  # without this key another rotation is meant
        scaling = _scaling(rope) or {"rope_type": rope.rope_type}
        values["rope_parameters"] = {"rope_theta": rope.rope_theta} | scaling
        if "partial_rotary_factor" in family.defaults:
            values["rope_parameters"]["partial_rotary_factor"] = rope.partial_rotary_factor
        return
    values["rope_theta"], values["rope_scaling"] = rope.rope_theta, _scaling(rope)
    if "partial_rotary_factor" in family.defaults:
        values["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.rope_type == "longrope":
        original = rope.original_max_position_embeddings
        values["original_max_position_embeddings"] = original
    if local is None:
        return
    of_full = family.defaults["rope_local_base_freq"] is None  # theta is that of the full layers
    if not of_full:
        values["rope_local_base_freq"] = local.rope_theta
    elif local == RopeConfig(rope.rope_theta) and rope.rope_theta == family.defaults["rope_theta"]:
        return  # another theta of the sliding layers is not read from the older keys
    if of_full or local.rope_type != "default":  # version 4 has no key for it
        values["rope_parameters"] = nested


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """Return the value of rope_scaling, or None if it would say nothing."""
    names = [*_SCALING_KEYS[rope.rope_type], *_BESIDE_SCALING]
    values = {name: getattr(rope, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    if rope.rope_type == "proportional" and rope.factor == 1:
        del given["factor"]  # transformers warns of it
    return {"rope_type": rope.rope_type} | given if given else None
