"""Plan the modules that an adapter trains whole, beside the layers that it adapts.

`modules_to_save` names them, as in PEFT: by the whole name, or its end after a dot. The adapter
gets a copy of each, which trains; the module itself stays as it was.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lorakit.adapters.layers.whole_modules import SavedModule
from lorakit.adapters.manage import attached
from lorakit.adapters.plan import Plan
from lorakit.adapters.targets import ends_with
from lorakit.adapters.tied_weights import embedding_of_head, heads_of_embedding
from lorakit.config.adapters import TargetConfig
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.patterns import lies_in
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import PackedWeight
from lorakit.models.sharding import gathered

HEAD = "score"  # the head of a Classifier
_ONLY_LORA = "shares its weight with another module; only LoRA saves both"


def plan_modules_to_save(plan: Plan, config: TargetConfig, tied: str | None = _ONLY_LORA) -> None:
    """Add the modules of `config.modules_to_save` to the plan.

    `tied` says why a module that shares its weight is refused. None means that it is not refused:
    an embedding is then saved together with the heads that have its weight.
    """
    entries = config.modules_to_save or []
    if "lm_head" in entries and "lm_head" not in plan.layers and isinstance(plan.model, Decoder):
        raise LorakitError(
            "modules_to_save: lm_head shares its weight with model.embed_tokens; save that one, "
            "with ensure_weight_tying"
        )
    for name in _named(plan.layers, entries):
        layer = plan.layers[name]
        heads = heads_of_embedding(plan.model, plan.layers, layer)
        embedding = embedding_of_head(plan.layers, layer)
        if (heads is not None or embedding is not None) and tied is not None:
            raise LorakitError(f"attach: {name} {tied}")
        if embedding is not None:
            raise LorakitError(f"attach: {name} shares its weight with {embedding}; save that one")
        wrapper = plan.wrap(name, SavedModule)
        if wrapper is not None:
            plan.add(wrapper, _trainable_copy(name, wrapper.base))
            plan.tie_heads(heads or [], wrapper)


def with_head_saved(config: Any) -> Any:
    """Return the config of an adapter that trains the head for classes too, as PEFT's SEQ_CLS does.

    Raises LorakitError for a learned prompt, which trains no module.
    """
    if not isinstance(config, TargetConfig):
        raise LorakitError(
            "attach: a learned prompt trains no head for classes; take a method that adapts layers"
        )
    saved = config.modules_to_save or []
    return config if HEAD in saved else replace(config, modules_to_save=[*saved, HEAD])


def _named(layers: Mapping[str, nn.Module], entries: Sequence[str]) -> Iterator[str]:
    """Yield the names of the modules that `entries` of modules_to_save mean."""
    for entry in entries:
        hits = [name for name in layers if ends_with(name, entry)]
        if not hits:
            leaves = {name.rpartition(".")[2] for name in layers}
            raise LorakitError(
                f"modules_to_save: {entry!r} matches no module{nearest(entry, leaves)}"
            )
        for hit in hits:
            around = [other for other in entries if lies_in(hit, other)]
            if not all(ends_with(hit, other) for other in around):
                raise LorakitError(
                    f"modules_to_save: {hit} lies in another one that is named ({around[0]}): that "
                    "one is trained whole already"
                )
        yield from hits


def _trainable_copy(name: str, module: nn.Module) -> nn.Module:
    if attached(module):
        raise LorakitError(
            f"modules_to_save: {name} holds layers of another adapter; detach that first"
        )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise LorakitError(
            f"modules_to_save: {name} only holds modules, and is not called; name those in it"
        )
    packed = any(not p.is_floating_point() for p in module.parameters())
    if packed or isinstance(module, PackedWeight):
        raise LorakitError(f"modules_to_save: {name} is packed; only a dense module can be trained")
    if not list(module.parameters()):
        raise LorakitError(f"modules_to_save: {name} has no parameters")
    with gathered(module):
        return copy.deepcopy(module).requires_grad_(True)
