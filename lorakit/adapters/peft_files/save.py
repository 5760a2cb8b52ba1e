"""Adapters on disk, in PEFT's format; adapter_loading.py reads what is written here.

    adapter_config.json          the LoraConfig, with the fields that every PEFT version reads
    adapter_model.safetensors    base_model.model.<module>.<ending>, where <ending> is

    lora_A.weight [r, in], lora_B.weight [out, r]               a linear layer
    lora_B.bias [out], lora_magnitude_vector [out]              with lora_bias, with DoRA
    lora_embedding_A [r, V], lora_embedding_B [H, r]            an embedding
    token_adapter.trainable_tokens_delta [n, H]                 trained rows of an embedding
    base_layer.bias [out]; bias                                 a trained bias; of no adapted layer
    weight, and the like                                        a module that is trained whole
    ia3_l [out, 1] or [1, in]                                   IA3
    vera_lambda_b [out], vera_lambda_d [r]                      VeRA, whose matrices of all layers
                                                                are base_model.vera_A and vera_B
    lora_A [r, in], lora_B [out, r], lora_E [r, 1]              AdaLoRA, the triplets that are left

A prompt has no module: it is prompt_embeddings, [n, H], or [n, 2 L Hk D] for keys and values.

What is written is always plain: an adapter that started from a part of the weight (PiSSA, OLoRA) as
one of twice the rank over the weight as it was. `target_modules` is written as the full names of
the adapted layers, so that reading does not depend on what "all-linear" means elsewhere.

Experts are linear layers of their own, as in the published checkpoints; the fused form of
transformers 5 is written on request (experts.py).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.base import AttachedLinear
from lorakit.adapters.layers.lora import lora_layers
from lorakit.adapters.layers.whole_modules import SavedModule
from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import (
    adapter_config,
    attached,
    check_adapter,
    outer_modules,
    selected_adapter,
)
from lorakit.adapters.methods.adalora import AdaLoraConfig
from lorakit.adapters.methods.ia3 import IA3Config
from lorakit.adapters.methods.prompts import PromptConfig, shape_fields
from lorakit.adapters.methods.vera import VeraConfig
from lorakit.adapters.peft_files.experts import join_experts
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PATTERNS, PREFIX, WEIGHTS_FILE
from lorakit.adapters.peft_files.ties import (
    PEFT_TYPES,
    TWINS,
    key_of,
    projection_tensors,
    tied_heads,
)
from lorakit.config.adapters import LoraConfig, TargetConfig
from lorakit.config.errors import LorakitError
from lorakit.config.patterns import each_alone, endings
from lorakit.files.local import as_path, write_json
from lorakit.files.safetensors import write_safetensors
from lorakit.models.decoder import Decoder


@runtime_checkable
class Generating(Protocol):
    """A causal language model of transformers."""

    def prepare_inputs_for_generation(self, *args, **options): ...


def save_adapter(
    module: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    fused_experts: bool = False,
) -> None:
    """Write adapter `name` of `module`, by default the selected one, into directory `path`, which
    is made if missing.

    `base_model` is recorded as base_model_name_or_path. fused_experts writes the experts of a
    `Decoder` as transformers 5 holds them; by default they are linear layers of their own, which
    PEFT and every server read. The weights are written before the config, and each file whole or
    not at all. Raises LorakitError if there is no such adapter, or its experts cannot be fused.
    """
    name = selected_adapter(module) if name is None else name
    check_adapter(module, name or "default", "save_adapter")
    config = adapter_config(module, name)
    having = {place: m for place, m in attached(module).items() if name in m.adapters}
    tensors = adapter_tensors(module, name)
    if isinstance(config, VeraConfig) and config.save_projection:
        tensors |= projection_tensors(module, name)
    if isinstance(config, LoraConfig):
        values = _lora_values(module, name, config, having)
    else:
        values = _written_plainly(config, name, having, module)
    if not isinstance(module, (Decoder, Generating)):  # PEFT asks one of CAUSAL_LM to generate
        values["task_type"] = None
    if fused_experts:
        tensors, values = _fused(module, tensors, values)
    path = as_path(path)
    if path.exists() and not path.is_dir():
        raise LorakitError(f"save_adapter: {path} is a file; a directory is wanted")
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / WEIGHTS_FILE, tensors)
    write_json(path / CONFIG_FILE, values | {"base_model_name_or_path": base_model})


def _lora_values(
    module: nn.Module, name: str, config: LoraConfig, having: Mapping[str, Attached]
) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter on the modules `having` it."""
    layers = lora_layers(module)
    places = sorted(place for place in having if place in layers)
    starts = [place for place in places if layers[place].adapters[name].start_A is not None]
    values = _written(config, bool(starts), places)
    if 0 < len(starts) < len(places):  # an embedding starts as ever, and keeps its rank
        more = math.sqrt(2) if config.use_rslora else 2
        ranks = {p: config.rank(p) * (2 if p in starts else 1) for p in places}
        alphas = {p: config.alpha(p) * (more if p in starts else 1) for p in places}
        values["rank_pattern"] = each_alone(ranks, places)
        values["alpha_pattern"] = each_alone(alphas, places)
    for head, place in tied_heads(module).items():  # to PEFT a layer of its own
        written = dataclasses.replace(
            LoraConfig(r=values["r"], lora_alpha=values["lora_alpha"]),
            **{key: values.get(key, {}) for key in PATTERNS},
        )
        for key, of in (("rank_pattern", LoraConfig.rank), ("alpha_pattern", LoraConfig.alpha)):
            if place in places and of(written, place) != of(written, head):
                values[key] = {**values.get(key, {}), head: of(written, place)}
    values["target_modules"] = _targets(places, module)
    if config.modules_to_save:  # whole names: PEFT takes "norm" for every layernorm too
        saved = [place for place, each in having.items() if isinstance(each, SavedModule)]
        values["modules_to_save"] = sorted(saved)
    return values


def _written_plainly(
    config: TargetConfig | PromptConfig,
    name: str,
    having: Mapping[str, Attached],
    module: nn.Module,
) -> dict[str, Any]:
    """The config of another method: every field, the layers by their full names."""
    kind = next(key for key, kind in PEFT_TYPES.items() if kind is type(config))
    values = dataclasses.asdict(config) | {"peft_type": kind, "task_type": "CAUSAL_LM"}
    values["inference_mode"] = True
    if isinstance(config, PromptConfig):
        return values | shape_fields(config, module.config)
    for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        del values[key]
    parts = {
        n: m.adapters[name] for n, m in sorted(having.items()) if isinstance(m, AttachedLinear)
    }
    values["target_modules"] = _targets(list(parts), module)
    if isinstance(config, IA3Config):
        fed = [n for n, part in parts.items() if part.feedforward]
        values["feedforward_modules"] = _targets(fed, module)
    if isinstance(config, AdaLoraConfig):
        patterns = {f"{n}.lora_E": part.pattern() for n, part in parts.items()}
        cut = any(not all(pattern) for pattern in patterns.values())
        values["rank_pattern"] = patterns if cut else None
    return values


def adapter_tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """What is written of adapter `name`, by its key in the file."""
    found = attached(module)
    tensors = {
        key_of(place, each, ending): tensor.detach()
        for place, each in found.items()
        if name in each.adapters
        for ending, tensor in each.tensors_to_save(name).items()
    }
    for head, place in tied_heads(module).items():  # PEFT looks for it under both names
        for ending, (other, transposed) in TWINS.items():
            if (own := tensors.get(f"{PREFIX}{place}.{other}")) is not None:
                twin = own.t() if transposed else own
                tensors[f"{PREFIX}{head}.{ending}"] = twin.clone(
                    memory_format=torch.contiguous_format
                )
    return tensors


def _written(config: LoraConfig, twice: bool, places: list[str]) -> dict[str, Any]:
    """The config of a plain adapter on `places`, of twice the rank if it is to hold what it started
    from too: the scaling stays, so alpha grows as r does, or with rsLoRA as its root.
    """
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": config.bias,
        "fan_in_fan_out": config.fan_in_fan_out,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
    }
    for name in (
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
    ):
        if getattr(config, name):  # older readers know fewer names
            values[name] = getattr(config, name)
    values |= _patterns(config, places)
    if twice:
        more = math.sqrt(2) if config.use_rslora else 2
        values["r"], values["lora_alpha"] = 2 * config.r, more * config.lora_alpha
        for name, factor in (("rank_pattern", 2), ("alpha_pattern", more)):
            if name in values:
                values[name] = {key: factor * value for key, value in values[name].items()}
    return values


def _patterns(config: LoraConfig, places: list[str]) -> dict[str, Any]:
    """rank_pattern and alpha_pattern, where they are used. JSON is written, here and by PEFT, with
    sorted keys, and the first key that matches counts: where the order matters, whole names.
    """
    written = {}
    for name, of in (("rank_pattern", LoraConfig.rank), ("alpha_pattern", LoraConfig.alpha)):
        pattern = dict(sorted(getattr(config, name).items()))
        same = dataclasses.replace(config, **{name: pattern})
        if any(of(same, place) != of(config, place) for place in places):
            pattern = each_alone({place: of(config, place) for place in places}, places)
        if pattern:
            written[name] = pattern
    return written


def _targets(places: list[str], module: nn.Module) -> str | list[str]:
    """target_modules that select `places`: their names, or, where the name of another layer ends in
    one of them, a regex.
    """
    others = {name for name, _ in outer_modules(module)}.difference(places)
    if not endings(others).isdisjoint(places):
        return "|".join(re.escape(place) for place in places)
    return places


def _fused(
    module: nn.Module, tensors: dict[str, Tensor], values: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapters of experts as those of the two parameters of transformers 5, gate and up with
    twice the rank (see experts.py).
    """
    if not isinstance(module, Decoder) or not module.config.num_experts:
        raise LorakitError("save_adapter: fused_experts, but the model has no experts")
    block, *leaves = module.config.moe_names
    single = re.compile(rf".*\.{block}\.experts\.\d+\.({'|'.join(leaves)})")
    places = [place for place in values["target_modules"] if not single.fullmatch(place)]
    experts = [place for place in values["target_modules"] if single.fullmatch(place)]
    config = LoraConfig(**{key: values[key] for key in ("r", "lora_alpha", "use_rslora")})
    config = dataclasses.replace(config, **{key: values.get(key, {}) for key in PATTERNS})
    kinds = {(config.rank(place), config.alpha(place)) for place in experts}
    if len(kinds) != 1 or values.get("use_dora"):
        raise LorakitError(
            "save_adapter: fused_experts needs adapted experts, all of one rank and alpha, and no "
            "use_dora"
        )
    ((r, alpha),) = kinds
    more = math.sqrt(2) if config.use_rslora else 2
    has = {place.rpartition(".")[2] for place in experts}
    parameters: list[str] = []
    ranks = {place: config.rank(place) for place in places if config.rank(place) != config.r}
    alphas = {p: config.alpha(p) for p in places if config.alpha(p) != config.lora_alpha}
    for parameter, leaf, factors in (
        ("gate_up_proj", leaves[0], (2, more)),
        ("down_proj", leaves[2], (1, 1)),
    ):
        if leaf in has:
            parameters.append(f"mlp.experts.{parameter}")
            ranks[f"experts.{parameter}"] = factors[0] * r
            alphas[f"experts.{parameter}"] = factors[1] * alpha
    values |= {"target_modules": places, "target_parameters": parameters}
    values |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    fused = join_experts(tensors, module.config.moe_names)
    return {PREFIX + name: tensor for name, tensor in fused.items()}, values
