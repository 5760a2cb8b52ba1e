"""adapter_config.json of LoRA, written and read.

What is written is always plain: an adapter that started from a part of the weight (PiSSA, OLoRA) is
one of twice the rank over the weight as it was. The scaling stays, so lora_alpha grows as r does.
With rsLoRA it would grow as the root of r; it is written without rsLoRA where that makes it a whole
number, as servers read it. `target_modules` are the shortest names that select the adapted layers,
so that a reader need not know what "all-linear" means here. Options that older versions of PEFT
lack are written only where they are used.

The first key of a rank_pattern or alpha_pattern that matches a layer counts, and JSON is written
with sorted keys, here and by PEFT. Where that order would change a rank or an alpha, the pattern is
written with one whole name for each layer.
"""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from statistics import mode
from typing import Any

from torch import nn

from lorakit.adapters.layers.embeddings import TiedHead
from lorakit.adapters.layers.lora import lora_layers
from lorakit.adapters.layers.whole_modules import SavedModule
from lorakit.adapters.manage import attached, outer_modules
from lorakit.adapters.peft_files.layout import (
    CONFIG_FILE,
    PATTERNS,
    PEFT_ALPHA,
    PEFT_RANK,
    PREFIX,
    AdapterFiles,
    name_in,
)
from lorakit.adapters.peft_files.ties import adapted_heads
from lorakit.adapters.targets import targets_for
from lorakit.adapters.tied_weights import embedding_of_head
from lorakit.config.adapters import PLAIN_INITIALIZATIONS, LoraConfig
from lorakit.config.errors import LorakitError
from lorakit.config.fields import from_mapping
from lorakit.config.patterns import each_alone
from lorakit.models.classifier import is_tied
from lorakit.models.decoder import Decoder

log = logging.getLogger("lorakit")

Values = dict[str, Any]

# Starts that lorakit finds again from the weight when it loads such a file. pissa_niter_N begins at
# random numbers, so it cannot be among them.
FROM_THE_WEIGHT = ("pissa", "olora")


def values_of_lora(model: nn.Module, name: str, config: LoraConfig) -> Values:
    """Return the values of adapter_config.json for LoRA adapter `name`, which has this config."""
    layers = {p: each for p, each in sorted(lora_layers(model).items()) if name in each.adapters}
    places = list(layers)
    doubled = [p for p, each in layers.items() if each.adapters[name].start_A is not None]
    written = _in_sorted_order(config, places)
    if doubled:
        written = _of_twice_the_rank(written, places, doubled)
    written = _with_tied_heads(written, places, model)
    _say_what_servers_refuse(written)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": config.bias,
        "fan_in_fan_out": config.fan_in_fan_out,
        "lora_dropout": config.lora_dropout,
        "use_rslora": written.use_rslora,
        "r": written.r,
        "lora_alpha": _whole(written.lora_alpha),
        "target_modules": targets_for(places, model),
    }
    where_used: Values = {
        "rank_pattern": written.rank_pattern,
        "alpha_pattern": {key: _whole(alpha) for key, alpha in written.alpha_pattern.items()},
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "trainable_token_indices": config.trainable_token_indices,
        "ensure_weight_tying": config.ensure_weight_tying,
    }
    if config.modules_to_save:  # whole names: to PEFT "norm" is the end of "input_layernorm" too
        where_used["modules_to_save"] = _saved_modules(model, name)
    return values | {key: value for key, value in where_used.items() if value}


def _say_what_servers_refuse(config: LoraConfig) -> None:
    """Say in the log that an alpha is no whole number, which some servers refuse."""
    alphas = [config.lora_alpha, *config.alpha_pattern.values()]
    fractions = [alpha for alpha in alphas if not float(alpha).is_integer()]
    if fractions:
        log.warning(
            "lorakit: save_adapter: lora_alpha is %s, and some servers read whole numbers alone; "
            "convert_adapter writes the adapter with one",
            fractions[0],
        )


def _whole(alpha: int | float) -> int | float:
    """Return an alpha that is a whole number as an int: some readers take no point, as in 16.0."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _saved_modules(model: nn.Module, name: str) -> list[str]:
    """Return the names of the modules that adapter `name` trains whole."""
    return sorted(
        place
        for place, each in attached(model).items()
        if isinstance(each, SavedModule) and name in each.adapters
    )


def _in_sorted_order(config: LoraConfig, places: Sequence[str]) -> LoraConfig:
    """Return a config of r, lora_alpha and sorted patterns that mean the same for `places`."""
    ordered = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        rank_pattern=dict(sorted(config.rank_pattern.items())),
        alpha_pattern=dict(sorted(config.alpha_pattern.items())),
        use_rslora=config.use_rslora,
    )
    ranks = {place: config.rank(place) for place in places}
    alphas = {place: config.alpha(place) for place in places}
    if any(ordered.rank(place) != rank for place, rank in ranks.items()):
        ordered = dataclasses.replace(ordered, rank_pattern=each_alone(ranks, places))
    if any(ordered.alpha(place) != alpha for place, alpha in alphas.items()):
        ordered = dataclasses.replace(ordered, alpha_pattern=each_alone(alphas, places))
    return ordered


def _of_twice_the_rank(
    config: LoraConfig, places: Sequence[str], doubled: Sequence[str]
) -> LoraConfig:
    """Return a config of r, lora_alpha and patterns in which the layers `doubled` hold a start.

    An embedding starts as it always does, and keeps its rank. rsLoRA makes the alphas grow by the
    root of 2. So the config is written without rsLoRA where that makes them whole numbers.
    """
    ranks = {p: config.rank(p) * (2 if p in doubled else 1) for p in places}
    if config.use_rslora:
        plain = {p: config.alpha(p) * ranks[p] / math.sqrt(config.rank(p)) for p in places}
        if all(alpha.is_integer() for alpha in plain.values()):
            return of_each_layer(ranks, plain)
    more = math.sqrt(2) if config.use_rslora else 2
    if len(doubled) == len(places):
        rank_pattern = {key: 2 * r for key, r in config.rank_pattern.items()}
        alpha_pattern = {key: more * alpha for key, alpha in config.alpha_pattern.items()}
    else:
        alphas = {p: config.alpha(p) * (more if p in doubled else 1) for p in places}
        rank_pattern, alpha_pattern = each_alone(ranks, places), each_alone(alphas, places)
    return LoraConfig(
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=config.use_rslora,
    )


def of_each_layer(ranks: Mapping[str, int], alphas: Mapping[str, int | float]) -> LoraConfig:
    """Return a config without rsLoRA that gives each layer its rank and its alpha.

    What most layers have is the config's own, so that the patterns are short.
    """
    r, alpha = mode(ranks.values()), mode(alphas.values())
    other_ranks = {place: each for place, each in sorted(ranks.items()) if each != r}
    other_alphas = {place: each for place, each in sorted(alphas.items()) if each != alpha}
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern=each_alone(other_ranks, ranks),
        alpha_pattern=each_alone(other_alphas, ranks),
    )


def _with_tied_heads(config: LoraConfig, places: Sequence[str], model: nn.Module) -> LoraConfig:
    """Return the config with the rank and the alpha of each adapted embedding for its tied heads.

    To PEFT such a head is a layer of its own.
    """
    for head, place in adapted_heads(model).items():
        if place not in places:
            continue
        if config.rank(place) != config.rank(head):
            ranks = {**config.rank_pattern, head: config.rank(place)}
            config = dataclasses.replace(config, rank_pattern=ranks)
        if config.alpha(place) != config.alpha(head):
            alphas = {**config.alpha_pattern, head: config.alpha(place)}
            config = dataclasses.replace(config, alpha_pattern=alphas)
    return config


# ---- reading ----


def read_lora_config(files: AdapterFiles, model: nn.Module) -> LoraConfig:
    """Return the config that lorakit needs to attach the adapter in `files` to `model`.

    Raises LorakitError for an initialization that changed the base's weights, and as `from_mapping`
    does.
    """
    config = _config_in(files)
    changed: Values = {}
    if config.ensure_weight_tying:
        changed["rank_pattern"] = _without_tied_heads(config.rank_pattern, model)
        changed["alpha_pattern"] = _without_tied_heads(config.alpha_pattern, model)
    if isinstance(config.target_modules, list):
        changed["target_modules"] = [name_in(model, name) for name in config.target_modules]
    if config.modules_to_save:
        _check_tied_head(config, files, model)
        changed["modules_to_save"] = [
            name for entry in config.modules_to_save for name in _saved_as(entry, files, model)
        ]
    return dataclasses.replace(config, **changed)


def _config_in(files: AdapterFiles) -> LoraConfig:
    """Return the fields of lorakit's LoraConfig as the file has them."""
    init = files.values.get("init_lora_weights")
    plain = init in PLAIN_INITIALIZATIONS
    if not plain and init not in FROM_THE_WEIGHT:
        known = re.fullmatch(r"pissa_niter_\d+|corda|loftq|lora_ga", str(init))
        what = "changes" if known else "is not known to lorakit, and may change"
        raise LorakitError(
            f"{files.path}: init_lora_weights={json.dumps(init)} {what} the base weights; convert "
            "the adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    values: Values = {"r": PEFT_RANK, "lora_alpha": PEFT_ALPHA}
    values |= {key: value for key, value in files.values.items() if key in fields}
    for key in (*PATTERNS, "bias", "lora_bias", "ensure_weight_tying"):
        if key in values and values[key] is None:  # PEFT writes null for what is not used
            del values[key]
    values["init_lora_weights"] = True if plain else init
    if values.get("layers_to_transform") is None:
        values.pop("layers_pattern", None)
    return from_mapping(LoraConfig, values, str(files.path / CONFIG_FILE))


def _without_tied_heads(pattern: Mapping[str, Any], model: nn.Module) -> Values:
    """Return a pattern without the heads that compute with an embedding's weight.

    To PEFT they are layers of their own; here they follow the embedding.
    """
    layers = dict(outer_modules(model))
    return {key: value for key, value in pattern.items() if not _is_tied(key, layers, model)}


def _is_tied(name: str, layers: Mapping[str, nn.Module], model: nn.Module) -> bool:
    if isinstance(model, Decoder) and name == "lm_head":
        return is_tied(model)
    layer = layers.get(name)
    if layer is None:
        return False
    return isinstance(layer, TiedHead) or embedding_of_head(layers, layer) is not None


def _check_tied_head(config: LoraConfig, files: AdapterFiles, model: nn.Module) -> None:
    """Raise LorakitError if PEFT trained a head whole that is tied in `model`, and untied it."""
    alone = not config.ensure_weight_tying and "lm_head" in (config.modules_to_save or [])
    if alone and _is_tied("lm_head", {}, model) and f"{PREFIX}lm_head.weight" in files.tensors:
        raise LorakitError(
            f"{files.path}: lm_head was trained whole and apart from the embedding, whose weight "
            "it has in this model: merge the adapter with PEFT, and load the merged model"
        )


def _saved_as(entry: str, files: AdapterFiles, model: nn.Module) -> list[str]:
    """Return the modules that PEFT saved for an entry of modules_to_save.

    To PEFT an entry matches every name that ends in it, after a dot or not. So the saved modules
    are those of the matches that the file has tensors of. PEFT also names classifiers, which a
    model may not have.
    """
    entry = name_in(model, entry)
    keys = [name_in(model, key.removeprefix(PREFIX)) for key in files.tensors]
    within = {key.rpartition(".")[0] + "." for key in keys}
    ending = [name for name, _ in outer_modules(model) if name.endswith(entry)]
    found = [name for name in ending if any(each.startswith(f"{name}.") for each in within)]
    return found or ([entry] if ending else [])
