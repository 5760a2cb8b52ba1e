"""The text part of an adapter that was trained on a multimodal model.

A lorakit decoder is the text model alone. PEFT matched the names in adapter_config.json against
those of the whole model, where a layer is called model.language_model.layers.0.mlp.up_proj, or
language_model.model.layers.0.mlp.up_proj by older versions of transformers. A regex may depend on
any part of such a name, so none is rewritten. Each layer of the decoder gets the name that it had
in the model of the file. PEFT's rules are applied to these names, and what they mean is written
down by the decoder's own names:

    target_modules, exclude_modules, layers_to_transform     -> target_modules
    rank_pattern, alpha_pattern                               -> one entry for each layer
    feedforward_modules (IA3)                                 -> those among target_modules

Entries and tensors for the other towers mean nothing here. They are left aside, and a line in the
log says how many tensors that were.

`for_whole_model` is the way back. The files of such a base hold the multimodal model, and PEFT puts
an adapter onto that. An adapter with the text model's names would change nothing there, and PEFT
would only warn. Each layer is named in full, because the other towers have a q_proj too.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.manage import outer_modules
from lorakit.adapters.peft_files.layout import PATTERNS, PREFIX, AdapterFiles
from lorakit.adapters.plan import is_linear
from lorakit.adapters.targets import ends_with, is_target, layer_number
from lorakit.adapters.tied_weights import is_embedding
from lorakit.config.errors import LorakitError
from lorakit.config.patterns import each_alone, of_pattern, valid_regex
from lorakit.models.decoder import Decoder
from lorakit.models.multimodal import (
    LAYOUTS,
    in_another_tower,
    layout_of,
    name_in_layout,
    text_name,
)

log = logging.getLogger("lorakit")

_IN_MEMORY = LAYOUTS[-1]  # the names that transformers gives the modules of a multimodal model
_OF_ADALORA = ".lora_E"  # the end of the keys in its rank_pattern, which name tensors
_NAMING = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", *PATTERNS)
_PARTS_OF_MULTIMODAL = re.compile("language_model|vision|visual|multi_modal|audio")


def text_part(files: AdapterFiles, module: nn.Module) -> AdapterFiles:
    """Return the part of an adapter that belongs to the text model, by the text model's names.

    The files of an adapter that knows no other towers are returned as they are, and so are those of
    an adapter for a module that is no lorakit decoder.

    Args:
        files: The adapter as PEFT saved it.
        module: The module that it is to be loaded onto.

    Returns:
        The files without the other towers, and with target_modules and patterns that name the
        decoder's layers.

    Raises:
        LorakitError: The adapter changes no layer of the text model.
    """
    if not isinstance(module, Decoder):
        return files
    names = [key.removeprefix(PREFIX) for key in files.tensors]
    layout = layout_of(names)
    towers = [key for key in files.tensors if in_another_tower(key.removeprefix(PREFIX))]
    said = str([files.values.get(name) for name in _NAMING])
    if layout is None and not towers and _PARTS_OF_MULTIMODAL.search(said) is None:
        return files
    if towers:
        log.warning(
            "lorakit: %s: %d tensors of the other towers are left aside; lorakit computes the text "
            "model alone",
            files.path,
            len(towers),
        )
    tensors = {key: tensor for key, tensor in files.tensors.items() if key not in set(towers)}
    values = dict(files.values)
    if _can_be_applied(values):
        values |= _by_own_names(values, module, layout or {}, str(files.path))
    return files._replace(values=values, tensors=tensors)


def for_whole_model(
    module: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter by the names of the multimodal model whose files the base was loaded from.

    Args:
        module: The module that the adapter is attached to.
        tensors: The adapter's tensors by their keys for the text model alone.
        values: The adapter's config with names of the text model alone.

    Returns:
        Tensors and config. They are as they were if the base is no part of a multimodal model.
    """
    if not isinstance(module, Decoder) or not module.source or not module.source.surroundings:
        return dict(tensors), dict(values)
    layers, modules = _own_layers(module), [name for name, _ in outer_modules(module)]
    found = dict(values)
    for field in ("target_modules", "feedforward_modules"):
        if values.get(field):
            found[field] = [_there(name) for name in layers if is_target(name, values[field])]
    parameters = values.get("target_parameters") or []
    for field in PATTERNS:
        if pattern := values.get(field):
            of_experts = {
                key: value
                for key, value in pattern.items()
                if any(ends_with(name, key) for name in parameters)
            }
            found[field] = _pattern_there(pattern, layers, found["target_modules"]) | of_experts
    if saved := values.get("modules_to_save"):
        whole = [name for name in modules if any(ends_with(name, entry) for entry in saved)]
        found["modules_to_save"] = [_there(name) for name in whole]
    tokens = values.get("trainable_token_indices")
    if isinstance(tokens, dict):
        found["trainable_token_indices"] = {_there(name): ids for name, ids in tokens.items()}
    if parameters:
        found["target_parameters"] = [_there(name) for name in parameters]
    return {_key_there(key): tensor for key, tensor in tensors.items()}, found


def _there(name: str) -> str:
    return name_in_layout(name, _IN_MEMORY)


def _key_there(key: str) -> str:
    return PREFIX + _there(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else key


def _pattern_there(
    pattern: Mapping[str, Any], layers: Iterable[str], targets: list[str]
) -> dict[str, Any]:
    """Return a pattern with one entry for each adapted layer, or tied head, that it speaks of."""
    if any(key.endswith(_OF_ADALORA) for key in pattern):
        return {_there(key): triplets for key, triplets in pattern.items()}
    alone = {_there(name): value for name, value in _of_each(pattern, layers).items()}
    wanted = {*targets, "lm_head"}
    return each_alone({name: each for name, each in alone.items() if name in wanted}, targets)


def _can_be_applied(values: Mapping[str, Any]) -> bool:
    """Return whether the names are of the right types, and the regexes are valid.

    Otherwise the config is read as it stands, and the error about it is raised there.
    """
    targets, numbers = values.get("target_modules"), values.get("layers_to_transform")
    lists = [targets, *(values.get(name) or [] for name in _NAMING if name not in PATTERNS)]
    patterns = [values.get(name) or {} for name in PATTERNS]
    return (
        targets != "all-linear"
        and all(_is_regex(each) or _all_are(each, str) for each in lists)
        and (numbers is None or type(numbers) is int or _all_are(numbers, int))
        and all(isinstance(each, dict) and all(map(_is_regex, each)) for each in patterns)
    )


def _is_regex(value: Any) -> bool:
    return isinstance(value, str) and valid_regex(value)


def _all_are(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


def _by_own_names(
    values: Mapping[str, Any], model: Decoder, layout: Mapping[str, str], where: str
) -> dict[str, Any]:
    """Return the values that name layers, with the names that the decoder has."""
    own = _own_layers(model)
    # Somebody may have renamed the tensors and not the config, so other layouts come after this.
    for each in (layout, {}, *LAYOUTS):
        there = {name: name_in_layout(name, each) for name in own}
        chosen = _selected(values, there)
        if chosen:
            break
    if not chosen:
        raise LorakitError(f"{where}: the adapter changes no layer of the text model")
    found: dict[str, Any] = dict.fromkeys(_NAMING) | {"layers_to_transform": None}
    found["target_modules"] = chosen
    if values.get("feedforward_modules"):
        fed = values["feedforward_modules"]
        found["feedforward_modules"] = [name for name in chosen if is_target(there[name], fed)]
    for name in PATTERNS:
        pattern = values.get(name) or {}
        alone = _for_each(pattern, {layer: there[layer] for layer in chosen})
        of_tensors = {text_name(k): v for k, v in pattern.items() if k.endswith(_OF_ADALORA)}
        found[name] = of_tensors or each_alone(alone, chosen)
    if _all_are(values.get("modules_to_save"), str):
        found["modules_to_save"] = [text_name(name) for name in values["modules_to_save"]]
    tokens = values.get("trainable_token_indices")
    if isinstance(tokens, dict):
        found["trainable_token_indices"] = {text_name(str(k)): v for k, v in tokens.items()}
    return {key: value for key, value in found.items() if key in values}


def _own_layers(model: Decoder) -> list[str]:
    """Return the names of the layers that may be adapted, a tied head among them."""
    own = [name for name, each in outer_modules(model) if is_linear(each) or is_embedding(each)]
    return own if "lm_head" in own else [*own, "lm_head"]


def _selected(values: Mapping[str, Any], there: Mapping[str, str]) -> list[str]:
    """Return the layers that the config selects by PEFT's rules, given their names there."""
    targets, excluded = values["target_modules"], values.get("exclude_modules")
    named = targets if isinstance(targets, str) else frozenset(targets)
    chosen = [own for own, name in there.items() if is_target(name, named)]
    if excluded:
        chosen = [own for own in chosen if not is_target(there[own], excluded)]
    numbers = values.get("layers_to_transform")
    if isinstance(targets, str) or numbers is None or numbers == []:
        return chosen
    numbers = [numbers] if isinstance(numbers, int) else numbers
    patterns = _as_list(values.get("layers_pattern") or [])
    return [
        own
        for own in chosen
        if there[own] in named or layer_number(there[own], patterns) in numbers
    ]


def _as_list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _for_each(pattern: Mapping[str, Any], there: Mapping[str, str]) -> dict[str, Any]:
    """Return what a pattern says of each layer that it says something of."""
    found = {own: of_pattern(pattern, name, None) for own, name in there.items()}
    return {own: value for own, value in found.items() if value is not None}


def _of_each(pattern: Mapping[str, Any], layers: Iterable[str]) -> dict[str, Any]:
    return _for_each(pattern, {name: name for name in layers})
