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
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lorakit.adapters.manage import outer_modules
from lorakit.adapters.peft_files.layout import PATTERNS, PREFIX, AdapterFiles
from lorakit.adapters.plan import is_linear
from lorakit.adapters.targets import is_target, layer_number
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
    own = [name for name, each in outer_modules(model) if is_linear(each) or is_embedding(each)]
    own += ["lm_head"] if "lm_head" not in own else []
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
        alone = _for_each(values.get(name) or {}, {layer: there[layer] for layer in chosen})
        found[name] = each_alone(alone, chosen)
    tokens = values.get("trainable_token_indices")
    if isinstance(tokens, dict):
        found["trainable_token_indices"] = {text_name(str(k)): v for k, v in tokens.items()}
    return {key: value for key, value in found.items() if key in values}


def _selected(values: Mapping[str, Any], there: Mapping[str, str]) -> list[str]:
    """Return the layers that the config selects by PEFT's rules, given their names there."""
    targets, excluded = values["target_modules"], values.get("exclude_modules")
    chosen = [own for own, name in there.items() if is_target(name, targets)]
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
        if there[own] in targets or layer_number(there[own], patterns) in numbers
    ]


def _as_list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _for_each(pattern: Mapping[str, Any], there: Mapping[str, str]) -> dict[str, Any]:
    """Return what a pattern says of each layer that it says something of."""
    found = {own: of_pattern(pattern, name, None) for own, name in there.items()}
    return {own: value for own, value in found.items() if value is not None}
