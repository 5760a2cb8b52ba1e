"""Adapters that lorakit or PEFT wrote (the files are in adapter.py), onto a module.

What is read besides adapters of linear layers: those of the fused experts of transformers 5
(experts.py); full copies of adapted embeddings and heads, which PEFT adds, are checked against the
model's and left alone, and so is what it writes of a tied head; the names that multimodal
checkpoints gave the text model.
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

from lorakit.adapters.attach import attach
from lorakit.adapters.layers.embeddings import TiedHead
from lorakit.adapters.manage import (
    attached,
    delete_adapter,
    outer_modules,
    selected_adapter,
    set_adapter,
)
from lorakit.adapters.methods.adalora import AdaLoraConfig
from lorakit.adapters.methods.prompts import PromptConfig
from lorakit.adapters.methods.vera import VeraConfig
from lorakit.adapters.peft_files import features
from lorakit.adapters.peft_files.experts import is_fused, split_experts
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PATTERNS, PREFIX, WEIGHTS_FILE
from lorakit.adapters.peft_files.ties import (
    PEFT_TYPES,
    TWINS,
    embedding_of,
    key_of,
    projection_tensors,
    tied_heads,
)
from lorakit.adapters.plan import tied_embedding
from lorakit.config.adapters import PLAIN_INITIALIZATIONS, LoraConfig, TargetConfig
from lorakit.config.errors import LorakitError
from lorakit.config.fields import from_mapping
from lorakit.files.local import as_path, read_json
from lorakit.files.safetensors import LazyTensor, open_safetensors
from lorakit.models.decoder import Decoder
from lorakit.models.multimodal import text_name

# that lorakit keeps beside A and B, and that follow from the weight: pissa_niter_N is also random
STARTS = ("pissa", "olora")


def load_adapter(module: nn.Module, path: str | Path, *, name: str = "default") -> nn.Module:
    """Attach the PEFT adapter in directory `path` to `module` as `name`, in place, and select it;
    returns `module`.

    Raises LorakitError, and leaves `module` as it was, for a missing or truncated file, a PEFT
    feature that lorakit does not have, or tensors that are missing, unknown or of another shape.
    """
    path = as_path(path)
    values = read_json(path / CONFIG_FILE)
    if values.get("peft_type") not in list(PEFT_TYPES):  # it may be of a type that has no hash
        raise LorakitError(
            f"{path}: peft_type is {values.get('peft_type')!r}; lorakit has "
            + ", ".join(PEFT_TYPES)
        )
    features.check_file(path, values)
    if not (path / WEIGHTS_FILE).exists() and (path / "adapter_model.bin").exists():
        raise LorakitError(f"{path}: adapter_model.bin is pickled, which is not read; convert it")
    tensors = open_safetensors(path / WEIGHTS_FILE)
    if values.get("target_parameters"):
        tensors, values = _split(path, module, tensors, values)
    if values["peft_type"] == "LORA":
        config = _read_config(path, values, module, tensors)
    else:
        config = _read_plainly(path, values, module)
    trainable = {p: p.requires_grad for p in module.parameters()}
    before = selected_adapter(module)
    attach(module, config, name=name)
    try:
        expected = {
            key_of(place, each, ending).removeprefix(PREFIX): parameter
            for place, each in attached(module).items()
            if name in each.adapters
            for ending, parameter in each.loadable_tensors(name).items()
        }
        if isinstance(config, VeraConfig) and config.save_projection:
            expected |= projection_tensors(module, name)
        moved = isinstance(config, LoraConfig) and config.init_lora_weights in STARTS
        found = _matched(path, module, tensors, expected, moved)
        with torch.no_grad():
            for key, parameter in expected.items():
                tensor = found[key].read()
                if tensor.is_floating_point() != parameter.is_floating_point():
                    raise LorakitError(f"{path}: tensor {_full(key)} is of {tensor.dtype}")
                parameter.copy_(tensor)
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
    plain = init in PLAIN_INITIALIZATIONS
    if not plain and init not in STARTS:
        raise LorakitError(
            f"{path}: init_lora_weights={json.dumps(init)} changes the base weights; convert the "
            "adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    values = {key: value for key, value in values.items() if key in fields}
    for key in ("rank_pattern", "alpha_pattern", "bias", "lora_bias", "ensure_weight_tying"):
        if values.get(key, 0) is None:  # PEFT writes null for what is not used
            del values[key]
    values["init_lora_weights"] = True if plain else init
    if values.get("layers_to_transform") is None:
        values.pop("layers_pattern", None)
    config = from_mapping(LoraConfig, values, str(path / CONFIG_FILE))
    changed = {}
    if config.ensure_weight_tying:
        for key in PATTERNS:
            pattern = getattr(config, key).items()
            changed[key] = {k: value for k, value in pattern if not _is_tied_head(module, k)}
    if isinstance(config.target_modules, list):
        changed["target_modules"] = [_renamed(name, module) for name in config.target_modules]
    if config.modules_to_save:
        changed["modules_to_save"] = [
            name for entry in config.modules_to_save for name in _saved(entry, module, tensors)
        ]
    return dataclasses.replace(config, **changed)


def _is_tied_head(module: nn.Module, name: str) -> bool:
    """Whether the layer `name` computes with the weight of an embedding, and so follows it."""
    if isinstance(module, Decoder) and name == "lm_head":
        return module.lm_head is None
    places = dict(outer_modules(module))
    layer = places.get(name)
    return layer is not None and (
        isinstance(layer, TiedHead) or tied_embedding(places, layer) is not None
    )


def _saved(entry: str, module: nn.Module, tensors: Mapping[str, LazyTensor]) -> list[str]:
    """What PEFT saved for an entry of modules_to_save, which is an end of names, with a dot before
    it or not: what the file has tensors of.
    """
    entry = _renamed(entry, module)
    beginnings = {_renamed(key.removeprefix(PREFIX), module).rpartition(".")[0] for key in tensors}
    named = [name for name, _ in outer_modules(module) if name.endswith(entry)]
    found = [name for name in named if any(f"{b}.".startswith(f"{name}.") for b in beginnings)]
    return found or ([entry] if named else [])  # PEFT names classifiers that a model may not have


def _split(
    path: Path, module: nn.Module, tensors: Mapping[str, LazyTensor], values: Mapping[str, Any]
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Adapters of fused experts as those of each expert's layers, and the config for these."""
    parameters = values["target_parameters"]
    known = isinstance(module, Decoder) and module.config.num_experts
    known = known and isinstance(parameters, list)
    if not known or not all(str(p).endswith(("gate_up_proj", "down_proj")) for p in parameters):
        raise LorakitError(
            f"{path}: target_parameters={json.dumps(parameters)}: only experts of lorakit's own "
            "decoder are adapted as parameters"
        )
    fused = {n: t for n, t in tensors.items() if is_fused(re.sub(r"\.lora_[AB]\..*", "", n))}
    names = module.config.moe_names
    block, *_, down = names
    read = {name: tensor.read() for name, tensor in fused.items()}
    single = split_experts(read, module.config.num_experts, names, parameters)
    wanted = ("r", "lora_alpha", "use_rslora", *PATTERNS)
    config = from_mapping(
        LoraConfig,
        {key: values[key] for key in wanted if values.get(key) is not None},
        str(path / CONFIG_FILE),
    )
    ranks, alphas = {}, {}
    for key, A in single.items():
        if key.endswith(".lora_A.weight"):
            place = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            beginning, leaf = place.partition(f".{block}.experts.")[0], place.rpartition(".")[2]
            parameter = "down_proj" if leaf == down else "gate_up_proj"
            scaling = config.scaling(f"{beginning}.mlp.experts.{parameter}")
            ranks[place] = len(A)
            alphas[place] = scaling * (math.sqrt(len(A)) if config.use_rslora else len(A))
    rest = {name: tensor for name, tensor in tensors.items() if name not in fused}
    for name in rest:
        if name.endswith(".lora_A.weight"):
            place = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            ranks[place], alphas[place] = config.rank(place), config.alpha(place)
    lazy = {n: LazyTensor(tuple(t.shape), lambda t=t: t) for n, t in single.items()}
    more = {"target_modules": list(ranks), "rank_pattern": ranks, "alpha_pattern": alphas}
    return rest | lazy, {**values, **more, "target_parameters": None}


def _read_plainly(
    path: Path, values: Mapping[str, Any], module: nn.Module
) -> TargetConfig | PromptConfig:
    """The config of another method than LoRA."""
    if values.get("bias", "none") != "none":
        raise LorakitError(f"{path}: bias={json.dumps(values['bias'])} is for LoRA alone")
    kind = PEFT_TYPES[values["peft_type"]]
    fields = {f.name for f in dataclasses.fields(kind)}
    values = {key: value for key, value in values.items() if key in fields and value is not None}
    if values.get("layers_to_transform") is None:
        values.pop("layers_pattern", None)
    if issubclass(kind, PromptConfig):
        values["inference_mode"] = True
    config = from_mapping(kind, values, str(path / CONFIG_FILE))
    changed = {}
    for key in fields & {"target_modules", "feedforward_modules"}:
        if isinstance(names := getattr(config, key), list):
            changed[key] = [_renamed(name, module) for name in names]
    if isinstance(config, AdaLoraConfig) and config.rank_pattern:
        pattern = config.rank_pattern.items()
        changed["rank_pattern"] = {_renamed(key, module): kept for key, kept in pattern}
    return dataclasses.replace(config, **changed)


def _renamed(name: str, module: nn.Module) -> str:
    """The name in `module` of what a multimodal model calls `name`."""
    return text_name(name) if isinstance(module, Decoder) else name


def _matched(
    path: Path,
    module: nn.Module,
    tensors: Mapping[str, LazyTensor],
    expected: Mapping[str, Tensor],
    moved: bool,
) -> dict[str, LazyTensor]:
    """The tensors of the file by the keys of `expected`, all there and none too many. moved: PEFT
    took what the adapter started from out of the weights that it added.
    """
    found, names = {}, {}
    for key, tensor in tensors.items():
        inner = key.removeprefix(PREFIX)
        inner = inner if inner in expected else _renamed(inner, module)
        found[inner], names[inner] = tensor, key
    for inner in [inner for inner in found if inner not in expected]:
        if not (
            _is_copy(path, module, inner, found[inner], moved)
            or _is_twin(path, module, inner, found)
        ):
            raise LorakitError(
                f"{path}: tensor {names[inner]} belongs to no adapted layer of this model"
            )
    for head, place in tied_heads(module).items():
        for ending, (other, _) in TWINS.items():
            if f"{place}.{other}" in expected and f"{head}.{ending}" not in found:
                raise LorakitError(
                    f"{path}: {place} is adapted, and {head}, which has its weight in this model, "
                    "is not: the adapter was trained without tying them (ensure_weight_tying)"
                )
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


def _is_copy(path: Path, module: nn.Module, key: str, tensor: LazyTensor, moved: bool) -> bool:
    """Whether `key` is the weight of an adapted embedding or head, which PEFT adds. It has to be
    the model's own: with another one the adapter was trained on another model.
    """
    place, base, _ = key.rpartition(".base_layer.weight")
    each = attached(module).get(embedding_of(module, place) or place)
    if not base or each is None:
        return False
    own = each.original._parameters.get("weight")
    if own is None or not own.is_floating_point():
        return True  # packed: not comparable bit by bit
    same = moved or torch.equal(tensor.read().to(own), own)
    if tensor.shape != tuple(own.shape) or not same:
        raise LorakitError(
            f"{path}: {key} differs from the model's: the adapter was trained on another model, or "
            "one with more tokens"
        )
    return True


def _is_twin(path: Path, module: nn.Module, key: str, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether `key` is what PEFT writes of a tied head. It has to be that of the embedding."""
    for ending, (other, transposed) in TWINS.items():
        embedding = embedding_of(module, key.removesuffix(f".{ending}"))
        twin = tensors.get(f"{embedding}.{other}")
        if embedding is None or twin is None:
            continue
        own = twin.read().t() if transposed else twin.read()
        if not torch.equal(tensors[key].read(), own):
            raise LorakitError(
                f"{path}: {key} differs from {embedding}.{other}, and in this model they are tied"
            )
        return True
    return False
