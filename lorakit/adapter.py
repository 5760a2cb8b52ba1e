"""Adapters on disk, in PEFT's format, both ways.

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

What is read besides: full copies of adapted embeddings and heads, which PEFT adds, are checked
against the model's and left alone; the names that multimodal checkpoints gave the text model.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adalora import AdaLoraConfig
from .attached import (
    Attached,
    adapter_config,
    attached,
    check_adapter,
    delete_adapter,
    selected_adapter,
    set_adapter,
)
from .attaching import attach
from .config import LoraConfig, LorakitError, TargetConfig, from_mapping
from .files import read_json, write_json
from .ia3 import IA3Config
from .lora import AttachedLinear, lora_layers
from .prompts import (
    PrefixTuningConfig,
    Prompt,
    PromptConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    shape_fields,
)
from .tensors import LazyTensor, open_safetensors, write_safetensors
from .vera import VeraConfig, projection

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_TYPES = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
    "VERA": VeraConfig,
    "ADALORA": AdaLoraConfig,
    "PROMPT_TUNING": PromptTuningConfig,
    "P_TUNING": PromptEncoderConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
}

# PEFT features that change the computation and that lorakit does not have: value when unused
UNSUPPORTED = {
    "target_parameters": None,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
}
# initializations after which A and B are all there is; others change the base, also on loading
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
STARTS = r"pissa(_niter_\d+)?|olora"  # that lorakit keeps beside A and B
# where multimodal checkpoints keep the text model, of several generations
TEXT = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.": ""}


def save_adapter(
    module: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write adapter `name` of `module`, by default the selected one, into directory `path`, which
    is made if missing.

    `base_model` is recorded as base_model_name_or_path. The weights are written before the config,
    and each file whole or not at all. Raises LorakitError if there is no such adapter.
    """
    name = selected_adapter(module) if name is None else name
    check_adapter(module, name or "default", "save_adapter")
    config = adapter_config(module, name)
    having = {place: m for place, m in attached(module).items() if name in m.adapters}
    tensors = {
        _key(place, each, ending): tensor.detach()
        for place, each in having.items()
        for ending, tensor in each.saved(name).items()
    }
    if isinstance(config, VeraConfig) and config.save_projection:
        tensors |= _projection(module, name)
    if isinstance(config, LoraConfig):
        layers = lora_layers(module)
        places = sorted(place for place in having if place in layers)
        twice = any(layers[place].adapters[name].start_A is not None for place in places)
        values = _written(config, twice) | {"target_modules": places}
    else:
        values = _written_plainly(config, name, having, module)
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / WEIGHTS_FILE, tensors)
    write_json(path / CONFIG_FILE, values | {"base_model_name_or_path": base_model})


def _key(place: str, each: Attached, ending: str) -> str:
    return ending if isinstance(each, Prompt) else f"{PREFIX}{place}.{ending}"


def _projection(module: nn.Module, name: str) -> dict[str, Tensor]:
    shared = projection(module, name)
    return {"base_model.vera_A": shared.A, "base_model.vera_B": shared.B}


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
    values["target_modules"] = list(parts)
    if isinstance(config, IA3Config):
        values["feedforward_modules"] = [n for n, part in parts.items() if part.feedforward]
    if isinstance(config, AdaLoraConfig):
        patterns = {f"{n}.lora_E": part.pattern() for n, part in parts.items()}
        cut = any(not all(pattern) for pattern in patterns.values())
        values["rank_pattern"] = patterns if cut else None
    return values


def _written(config: LoraConfig, twice: bool) -> dict[str, Any]:
    """The config of a plain adapter, of twice the rank if it is to hold what it started from too:
    the scaling stays, so alpha grows as r does, or with rsLoRA as its root.
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
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
    ):
        if getattr(config, name):  # older readers know fewer names
            values[name] = getattr(config, name)
    if twice:
        more = math.sqrt(2) if config.use_rslora else 2
        values["r"], values["lora_alpha"] = 2 * config.r, more * config.lora_alpha
        values["rank_pattern"] = {key: 2 * r for key, r in config.rank_pattern.items()}
        values["alpha_pattern"] = {key: more * a for key, a in config.alpha_pattern.items()}
    return values


def load_adapter(module: nn.Module, path: str | Path, *, name: str = "default") -> nn.Module:
    """Attach the PEFT adapter in directory `path` to `module` as `name`, in place, and select it;
    returns `module`.

    Raises LorakitError, and leaves `module` as it was, for a missing or truncated file, a PEFT
    feature that lorakit does not have, or tensors that are missing, unknown or of another shape.
    """
    path = Path(path).expanduser()
    values = read_json(path / CONFIG_FILE)
    if values.get("peft_type") not in PEFT_TYPES:
        raise LorakitError(
            f"{path}: peft_type is {values.get('peft_type')!r}; lorakit has "
            + ", ".join(PEFT_TYPES)
        )
    for key, unused in UNSUPPORTED.items():
        if values.get(key) not in (None, unused, []):
            raise LorakitError(f"{path}: {key}={json.dumps(values[key])} is not supported")
    tensors = open_safetensors(path / WEIGHTS_FILE)
    if values["peft_type"] == "LORA":
        config = _read_config(path, values, module, tensors)
    else:
        config = _read_plainly(path, values, module)
    trainable = {p: p.requires_grad for p in module.parameters()}
    before = selected_adapter(module)
    attach(module, config, name=name)
    try:
        expected = {
            _key(place, each, ending).removeprefix(PREFIX): parameter
            for place, each in attached(module).items()
            if name in each.adapters
            for ending, parameter in each.tensors(name).items()
        }
        if isinstance(config, VeraConfig) and config.save_projection:
            expected |= _projection(module, name)
        found = _matched(path, module, tensors, expected)
        with torch.no_grad():
            for key, parameter in expected.items():
                parameter.copy_(found[key].read())
    except BaseException:
        delete_adapter(module, name)
        if before is not None:
            set_adapter(module, before)
        for parameter, required in trainable.items():
            parameter.requires_grad_(required)
        raise
    return module


def _read_config(
    path: Path, values: Mapping[str, Any], module: nn.Module, tensors: Mapping[str, LazyTensor]
) -> LoraConfig:
    init = values.get("init_lora_weights")
    plain = init in PLAIN_INITS
    if not plain and not (isinstance(init, str) and re.fullmatch(STARTS, init)):
        raise LorakitError(
            f"{path}: init_lora_weights={json.dumps(init)} changes the base weights; convert the "
            "adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    fields = {f.name: f for f in dataclasses.fields(LoraConfig)}
    values = {key: value for key, value in values.items() if key in fields}
    for key in ("rank_pattern", "alpha_pattern", "bias", "lora_bias", "ensure_weight_tying"):
        if values.get(key, 0) is None:  # PEFT writes null for what is not used
            del values[key]
    values["init_lora_weights"] = True if plain else init
    targets = values.get("target_modules")
    if isinstance(targets, list):
        values["target_modules"] = [_renamed(target, module) for target in targets]
    if values.get("layers_to_transform") is None:
        values.pop("layers_pattern", None)
    return from_mapping(LoraConfig, values, str(path / CONFIG_FILE), ignore_unknown=True)


def _read_plainly(
    path: Path, values: Mapping[str, Any], module: nn.Module
) -> TargetConfig | PromptConfig:
    """The config of another method than LoRA."""
    if values.get("bias", "none") != "none":
        raise LorakitError(f"{path}: bias={json.dumps(values['bias'])} is for LoRA alone")
    kind = PEFT_TYPES[values["peft_type"]]
    fields = {f.name for f in dataclasses.fields(kind)}
    values = {key: value for key, value in values.items() if key in fields and value is not None}
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(values.get(key), list):
            values[key] = [_renamed(target, module) for target in values[key]]
    if "rank_pattern" in values:
        values["rank_pattern"] = {_renamed(k, module): v for k, v in values["rank_pattern"].items()}
    if values.get("layers_to_transform") is None:
        values.pop("layers_pattern", None)
    if issubclass(kind, PromptConfig):
        values["inference_mode"] = True
    return from_mapping(kind, values, str(path / CONFIG_FILE), ignore_unknown=True)


def _renamed(name: str, module: nn.Module) -> str:
    """The name in `module` of what a multimodal model calls `name`."""
    top = {child for child, _ in module.named_children()}
    if name.partition(".")[0] in top and not name.startswith("model.language_model."):
        return name
    for prefix, instead in TEXT.items():
        if (
            name.startswith(prefix)
            and f"{instead}{name.removeprefix(prefix)}".partition(".")[0] in top
        ):
            return instead + name.removeprefix(prefix)
    return name


def _matched(
    path: Path,
    module: nn.Module,
    tensors: Mapping[str, LazyTensor],
    expected: Mapping[str, nn.Parameter],
) -> dict[str, LazyTensor]:
    """The tensors of the file by the keys of `expected`, all there and none too many."""
    found = {}
    for key, tensor in tensors.items():
        inner = key.removeprefix(PREFIX)
        inner = inner if inner in expected else _renamed(inner, module)
        if inner in expected:
            found[inner] = tensor
        elif not _is_copy(path, module, inner, tensor):
            raise LorakitError(f"{path}: tensor {key} belongs to no adapted layer of this model")
    for key, parameter in expected.items():
        if key not in found:
            raise LorakitError(f"{path}: tensor {_full(key)} is missing")
        if found[key].shape != tuple(parameter.shape):
            raise LorakitError(
                f"{path}: tensor {_full(key)} is {found[key].shape}, "
                f"the model needs {tuple(parameter.shape)}"
            )
    return found


def _full(key: str) -> str:
    """The key in the file: what is no module's has no prefix."""
    return key if key.startswith("base_model.") or "." not in key else PREFIX + key


def _is_copy(path: Path, module: nn.Module, key: str, tensor: LazyTensor) -> bool:
    """Whether `key` is the weight of an adapted embedding or head, which PEFT adds. It has to be
    the model's own: with another one the adapter was trained on another model.
    """
    place, base, _ = key.rpartition(".base_layer.weight")
    each = attached(module).get(place)
    if not base or each is None:
        return False
    own = each.plain._parameters.get("weight")
    if own is None or not own.is_floating_point():
        return True  # packed: not comparable bit by bit
    if tensor.shape != tuple(own.shape) or not torch.equal(tensor.read().to(own), own):
        raise LorakitError(
            f"{path}: {key} differs from the model's: the adapter was trained on another model, or "
            "one with more tokens"
        )
    return True
