"""Carried out of lorakit/attached.py."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.base import (
    AttachedLinear,
    CalledBase,
    CalledTransposedBase,
    DenseBase,
    LinearBase,
    TransposedBase,
    must_be_called,
)
from lorakit.adapters.layers.embeddings import LoraEmbedding, TiedHead, TokenRows
from lorakit.adapters.layers.whole_modules import SavedModule, TrainedBias
from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import attached, outer_modules
from lorakit.adapters.targets import ends_with, select
from lorakit.config.adapters import LoraConfig, TargetConfig
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.patterns import lies_in
from lorakit.models.decoder import Decoder
from lorakit.models.packed_layers import PackedWeight


class Plan:
    """What an adapter is going to be: wrappers by place, and what it adds to each. A plan is made
    whole, with everything refused that has to be, before `attach` carries it out.
    """

    def __init__(self) -> None:
        self.places: dict[str, Attached] = {}
        self.parts: list[tuple[Attached, nn.Module]] = []
        self.made: dict[int, Attached] = {}  # of each module its wrapper: it may have two places

    def wrap(
        self, place: str, module: nn.Module, kind: type[Attached], make: Callable[[], Attached]
    ) -> Attached | None:
        """The wrapper of `module`, or None if it is known already."""
        if isinstance(module, Attached):
            if type(module) is not kind:
                raise LorakitError(
                    f"attach: {place} is a {type(module).__name__} of another adapter, and cannot "
                    f"be a {kind.__name__} too; leave it out (exclude_modules), or detach that one"
                )
            known = id(module) in self.made
            self.made[id(module)] = module
            return None if known else module
        known = id(module) in self.made
        if not known:
            self.made[id(module)] = make()
        self.places[place] = self.made[id(module)]
        return None if known else self.places[place]


Places = dict[str, nn.Module]


def check_linear(places: Places, place: str, instead: str) -> None:
    layer = places[place]
    if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
        raise LorakitError(f"attach: {place} is a {type(layer).__name__}, not an nn.Linear")
    if (other := tied_embedding(places, layer)) is not None:
        raise LorakitError(f"attach: {place} shares its weight with {other}; {instead}")


def linear_places(module: nn.Module, config: TargetConfig) -> Iterator[tuple[str, nn.Module]]:
    """The layers that `config` selects, by name, for a method that knows linear layers alone."""
    places = {n: m for n, m in outer_modules(module) if n}
    linear = [n for n, m in places.items() if is_linear(m, config)]
    for place in select(linear + within_saved(places), [], config):
        layer = found_modules(places, place)
        check_linear(places, place, "only LoRA adapts both")
        yield place, layer


def within_saved(places: Places) -> list[str]:
    """The linear layers in what another adapter trains whole."""
    return [
        f"{place}.{name}"
        for place, each in places.items()
        if isinstance(each, SavedModule)
        for name, inner in each.base.named_modules()
        if name and isinstance(inner, (nn.Linear, LinearBase))
    ]


def found_modules(places: Places, place: str) -> nn.Module:
    if place not in places:
        raise LorakitError(
            f"attach: {place} lies in a module that another adapter trains whole; leave it out "
            "(exclude_modules), or detach that one"
        )
    return places[place]


def save_whole(plan: Plan, module: nn.Module, config: TargetConfig, tie: bool = False) -> Plan:
    """`plan`, and in it the modules that are trained whole beside the adapted layers; with `tie`
    an embedding and the head that has its weight together.
    """
    places = {n: m for n, m in outer_modules(module) if n}
    for place in _saved(places, config):
        layer = places[place]
        heads = tied_heads(module, places, layer)
        other = tied_embedding(places, layer)
        if (heads is not None or other is not None) and not tie:
            if isinstance(config, LoraConfig):
                raise LorakitError(tied_message(place))
            raise LorakitError(
                f"attach: {place} shares its weight with another module; only LoRA saves both"
            )
        if other is not None:
            raise LorakitError(f"attach: {place} shares its weight with {other}; save that one")
        each = plan.wrap(place, layer, SavedModule, lambda layer=layer: SavedModule(layer))
        if each is not None:
            plan.parts.append((each, _copy(place, each.base)))
            tie_heads(plan, places, heads or [], each)
    return plan


def is_linear(module: nn.Module, config: TargetConfig) -> bool:
    module = _trained_as_it_is(module)
    transposed = config.fan_in_fan_out and _is_transposed(module)
    return transposed or isinstance(module, (nn.Linear, LinearBase, AttachedLinear))


def _trained_as_it_is(module: nn.Module) -> nn.Module:
    """What another adapter trains whole or by its bias; any other module itself."""
    return module.base if isinstance(module, (SavedModule, TrainedBias)) else module


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers, which is not imported for the question."""
    return type(module).__name__ == "Conv1D"


def is_embedding(module: nn.Module) -> bool:
    module = _trained_as_it_is(module)
    packed = isinstance(module, PackedWeight) and not isinstance(module, LinearBase)
    return isinstance(module, (nn.Embedding, LoraEmbedding, TokenRows)) or (
        packed and not isinstance(module, Attached)
    )


def base_of(layer: nn.Module) -> LinearBase:
    if isinstance(layer, LinearBase):
        return layer
    if _is_transposed(layer):
        return CalledTransposedBase(layer) if must_be_called(layer) else TransposedBase(layer)
    return CalledBase(layer) if must_be_called(layer) else DenseBase(layer)


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def tied_message(place: str) -> str:
    return (
        f"attach: {place} shares its weight with the output head; with ensure_weight_tying=true "
        "both are adapted alike and stay one"
    )


def _plain(module: nn.Module) -> nn.Module:
    return module.original if isinstance(module, Attached) else module


def _weight(module: nn.Module) -> Tensor | None:
    return _plain(module)._parameters.get("weight")


def tied_heads(module: nn.Module, places: Places, layer: nn.Module) -> list[str] | None:
    """The linear layers that share the weight of embedding `layer`; an empty list where the decoder
    uses the embedding itself as its head; None if there is no such thing.
    """
    layer = _plain(layer)
    if not isinstance(layer, nn.Embedding) and not isinstance(layer, PackedWeight):
        return None
    weight = _weight(layer)
    for name, other in places.items():
        same = weight is not None and _weight(other) is weight
        if same and is_embedding(other) and _plain(other) is not layer:
            raise LorakitError(
                f"attach: {name} is another embedding with the same weight, which would not be "
                "adapted; lorakit adapts an embedding and its heads alike, not several embeddings"
            )
    heads = [
        n
        for n, m in places.items()
        if _weight(m) is weight and isinstance(m, (nn.Linear, TiedHead))
    ]
    for each in module.modules():
        tied = isinstance(each, Decoder) and each.lm_head is None
        if tied and _plain(each.model.embed_tokens) is layer:
            return heads
    return heads or None


def tied_embedding(places: Places, layer: nn.Module) -> str | None:
    """The embedding that shares the weight of linear layer `layer`."""
    weight = _weight(layer)
    if weight is None or not isinstance(layer, nn.Linear):
        return None
    return next((n for n, m in places.items() if is_embedding(m) and _weight(m) is weight), None)


def tie_heads(plan: Plan, places: Places, heads: list[str], embedding: Attached) -> None:
    for place in heads:
        head = places[place]
        if not isinstance(head, TiedHead):
            plan.places[place] = TiedHead(head, embedding)


# ---- what is trained whole, or in part ----


def _saved(places: Places, config: TargetConfig) -> Iterator[str]:
    for entry in config.modules_to_save or []:
        hits = [n for n in places if ends_with(n, entry)]
        if not hits:
            leaves = {n.rpartition(".")[2] for n in places}
            raise LorakitError(
                f"modules_to_save: {entry!r} matches no module{nearest(entry, leaves)}"
            )
        for hit in hits:
            inside = [other for other in config.modules_to_save if lies_in(hit, other)]
            if not all(ends_with(hit, other) for other in inside):
                raise LorakitError(
                    f"modules_to_save: {hit} lies in another one that is named ({inside[0]}): that "
                    "one is trained whole already"
                )
        yield from hits


def _copy(place: str, module: nn.Module) -> nn.Module:
    if attached(module):
        raise LorakitError(
            f"modules_to_save: {place} holds layers of another adapter; detach that first"
        )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise LorakitError(
            f"modules_to_save: {place} only holds modules, and is not called; name those in it"
        )
    packed = [p for p in module.parameters() if not p.is_floating_point()]
    if packed or isinstance(module, PackedWeight):
        raise LorakitError(
            f"modules_to_save: {place} is packed; only a dense module can be trained"
        )
    if not list(module.parameters()):
        raise LorakitError(f"modules_to_save: {place} has no parameters")
    return copy.deepcopy(module).requires_grad_(True)
