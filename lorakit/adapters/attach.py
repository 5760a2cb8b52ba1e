"""Put an adapter on a module: which of its parts get what, and everything refused before anything
changes.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .adalora import AdaLoraConfig, AdaLoraLinear, AdaLoraPart
from .attached import (
    Attached,
    Plan,
    adapter_names,
    attached,
    check_new_name,
    check_no_block,
    plain_modules,
)
from .config import LoraConfig, LorakitError, TargetConfig, nearest
from .embeddings import LoraEmbedding, RowsPart, TiedHead, TokenRows
from .ia3 import IA3Config, IA3Linear, IA3Part
from .initialization import from_weight, initial, needs_weight
from .lora import (
    AttachedLinear,
    Base,
    CalledBase,
    CalledTransposedBase,
    DenseBase,
    LoraLinear,
    LoraPart,
    TransposedBase,
    is_called,
)
from .model import Decoder, PackedLayer
from .prompts import Prompt, PromptConfig, prompt_part
from .targets import ends_with, lies_in, match_targets, select
from .trained_modules import BiasPart, SavedModule, TrainedBias
from .vera import Projection, VeraConfig, VeraLinear, VeraPart

Places = dict[str, nn.Module]


def attach(
    module: nn.Module,
    config: TargetConfig | PromptConfig | None = None,
    *,
    name: str = "default",
) -> nn.Module:
    """Put adapter `name` on every layer of `module` that `config` selects, in place, and select it:
    it computes and trains, others that are attached wait for `set_adapter`. The type of `config`
    says by which method; LoRA, if there is none.

    With the first adapter all parameters of `module` are frozen. What is random is drawn from
    torch's global generator. Returns `module`.

    Raises LorakitError, and changes nothing, if an adapter of this name is attached, one is merged,
    an entry of `config` matches nothing, or something it selects cannot be adapted: it says which
    and why.
    """
    if not isinstance(module, nn.Module):
        raise LorakitError(f"attach: a module of torch is wanted, not {module!r:.60}")
    config = config or LoraConfig()
    names = adapter_names(module)
    check_new_name(module, name, "attach")
    check_no_block(module, "attach")
    if any(each.merged is not None for each in attached(module).values()):
        raise LorakitError("attach: an adapter is merged; unmerge it first")
    match config:
        case LoraConfig():
            plan = _lora(module, config)
        case IA3Config():
            plan = _ia3(module, config)
        case VeraConfig():
            plan = _vera(module, config)
        case AdaLoraConfig():
            plan = _adalora(module, config)
        case PromptConfig():
            plan = _prompt(module, config)
        case _:
            kind = f"{type(config).__module__}.{type(config).__name__}"
            raise LorakitError(
                f"attach: {kind} is no adapter's config of lorakit's, such as LoraConfig"
            )
    if not names:
        module.requires_grad_(False)
    for each, part in plan.parts:
        each.put(name, part)
    for place, layer in list(plain_modules(module)):  # a layer in two places is one in both
        if id(layer) in plan.made and layer is not plan.made[id(layer)]:
            plan.places[place] = plan.made[id(layer)]
    for place, each in plan.places.items():
        module.set_submodule(place, each)
    for each in attached(module).values():
        each.select(name)
    return module


def _lora(module: nn.Module, config: LoraConfig) -> Plan:
    places = {n: m for n, m in plain_modules(module) if n}
    linear = [n for n, m in places.items() if _is_linear(m, config)]
    embeddings = [n for n, m in places.items() if _is_embedding(m)]
    plan = Plan()
    for place in select(linear + _within_saved(places), embeddings, config):
        layer = _found(places, place)
        if _is_embedding(layer):
            _embedding(plan, module, places, place, config)
            continue
        _check_linear(places, place, "adapt that one, with ensure_weight_tying")
        each = plan.wrap(place, layer, LoraLinear, lambda layer=layer: LoraLinear(_base(layer)))
        if each is not None:
            plan.parts.append((each, _linear_part(each, place, config)))
    _save_whole(plan, module, config, config.ensure_weight_tying)
    for place, ids in _token_rows(places, embeddings, config):
        layer = places[place]
        saved = any(lies_in(place, m) for m in config.modules_to_save or [])
        if saved or isinstance(plan.made.get(id(layer)), LoraEmbedding):
            raise LorakitError(
                f"trainable_token_indices: {place} is among target_modules or modules_to_save too; "
                "keep one of them"
            )
        each = plan.wrap(place, layer, TokenRows, lambda layer=layer: TokenRows(layer))
        if each is not None:
            plan.parts.append((each, _rows_part(each, place, ids, config)))
            _tie(plan, places, _tied_heads(module, places, layer) or [], each)
    if config.bias == "all":
        for place, layer in places.items():
            plain = layer.plain if isinstance(layer, Attached) else layer
            bias = plain._parameters.get("bias")
            taken = place in plan.places or id(layer) in plan.made
            saved = any(lies_in(place, m) for m in config.modules_to_save or [])
            if bias is not None and not taken and not saved:
                if next(plain.children(), None) is not None:
                    raise LorakitError(
                        f"bias: {place} has a bias of its own beside the modules in it, which "
                        "'all' cannot train; choose 'lora_only' or 'none'"
                    )
                each = plan.wrap(place, layer, TrainedBias, lambda layer=layer: TrainedBias(layer))
                if each is not None:
                    plan.parts.append((each, BiasPart(bias)))
    return plan


def _check_linear(places: Places, place: str, instead: str) -> None:
    layer = places[place]
    if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
        raise LorakitError(f"attach: {place} is a {type(layer).__name__}, not an nn.Linear")
    if (other := tied_embedding(places, layer)) is not None:
        raise LorakitError(f"attach: {place} shares its weight with {other}; {instead}")


def _linear_places(module: nn.Module, config: TargetConfig) -> Iterator[tuple[str, nn.Module]]:
    """The layers that `config` selects, by name, for a method that knows linear layers alone."""
    places = {n: m for n, m in plain_modules(module) if n}
    linear = [n for n, m in places.items() if _is_linear(m, config)]
    for place in select(linear + _within_saved(places), [], config):
        layer = _found(places, place)
        _check_linear(places, place, "only LoRA adapts both")
        yield place, layer


def _within_saved(places: Places) -> list[str]:
    """The linear layers in what another adapter trains whole."""
    return [
        f"{place}.{name}"
        for place, each in places.items()
        if isinstance(each, SavedModule)
        for name, inner in each.base.named_modules()
        if name and isinstance(inner, (nn.Linear, Base))
    ]


def _found(places: Places, place: str) -> nn.Module:
    if place not in places:
        raise LorakitError(
            f"attach: {place} lies in a module that another adapter trains whole; leave it out "
            "(exclude_modules), or detach that one"
        )
    return places[place]


def _save_whole(plan: Plan, module: nn.Module, config: TargetConfig, tie: bool = False) -> Plan:
    """`plan`, and in it the modules that are trained whole beside the adapted layers; with `tie`
    an embedding and the head that has its weight together.
    """
    places = {n: m for n, m in plain_modules(module) if n}
    for place in _saved(places, config):
        layer = places[place]
        heads = _tied_heads(module, places, layer)
        other = tied_embedding(places, layer)
        if (heads is not None or other is not None) and not tie:
            if isinstance(config, LoraConfig):
                raise LorakitError(_tied_message(place))
            raise LorakitError(
                f"attach: {place} shares its weight with another module; only LoRA saves both"
            )
        if other is not None:
            raise LorakitError(f"attach: {place} shares its weight with {other}; save that one")
        each = plan.wrap(place, layer, SavedModule, lambda layer=layer: SavedModule(layer))
        if each is not None:
            plan.parts.append((each, _copy(place, each.base)))
            _tie(plan, places, heads or [], each)
    return plan


def _ia3(module: nn.Module, config: IA3Config) -> Plan:
    plan, chosen = Plan(), dict(_linear_places(module, config))
    inner = config.feedforward_modules
    fed = set(match_targets(list(chosen), inner, "feedforward_modules") if inner else ())
    for place, layer in chosen.items():
        each = plan.wrap(place, layer, IA3Linear, lambda layer=layer: IA3Linear(_base(layer)))
        if each is not None:
            size = each.in_features if place in fed else each.out_features
            part = IA3Part(config, size, place in fed).to(_device(each.base))
            plan.parts.append((each, part))
    return _save_whole(plan, module, config)


def _vera(module: nn.Module, config: VeraConfig) -> Plan:
    plan, found = Plan(), []
    for place, layer in _linear_places(module, config):
        each = plan.wrap(place, layer, VeraLinear, lambda layer=layer: VeraLinear(_base(layer)))
        if each is not None:
            found.append(each)
    largest = (max(e.in_features for e in found), max(e.out_features for e in found))
    projection = Projection(config, *largest).to(_device(found[0].base))
    for each in found:
        part = VeraPart(config, projection, each.in_features, each.out_features)
        plan.parts.append((each, part.to(_device(each.base))))
    return _save_whole(plan, module, config)


def _adalora(module: nn.Module, config: AdaLoraConfig) -> Plan:
    plan = Plan()
    for place, layer in _linear_places(module, config):
        each = plan.wrap(
            place, layer, AdaLoraLinear, lambda layer=layer: AdaLoraLinear(_base(layer))
        )
        if each is not None:
            part = AdaLoraPart(config, config.rank(place), each.in_features, each.out_features)
            plan.parts.append((each, part.to(_device(each.base))))
    return _save_whole(plan, module, config)


def _prompt(module: nn.Module, config: PromptConfig) -> Plan:
    if not isinstance(module, Decoder):
        raise LorakitError(
            f"attach: a prompt goes on a lorakit Decoder (see load_model), not on a "
            f"{type(module).__name__}"
        )
    plan, start = Plan(), module.beginning
    each = plan.wrap("beginning", start, Prompt, lambda: Prompt(start))
    plan.parts.append((each, prompt_part(module, config)))
    return plan


def _is_linear(module: nn.Module, config: TargetConfig) -> bool:
    module = _trained_as_it_is(module)
    transposed = config.fan_in_fan_out and _is_transposed(module)
    return transposed or isinstance(module, (nn.Linear, Base, AttachedLinear))


def _trained_as_it_is(module: nn.Module) -> nn.Module:
    """What another adapter trains whole or by its bias; any other module itself."""
    return module.base if isinstance(module, (SavedModule, TrainedBias)) else module


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers, which is not imported for the question."""
    return type(module).__name__ == "Conv1D"


def _is_embedding(module: nn.Module) -> bool:
    module = _trained_as_it_is(module)
    packed = isinstance(module, PackedLayer) and not isinstance(module, Base)
    return isinstance(module, (nn.Embedding, LoraEmbedding, TokenRows)) or (
        packed and not isinstance(module, Attached)
    )


def _base(layer: nn.Module) -> Base:
    if isinstance(layer, Base):
        return layer
    if _is_transposed(layer):
        return CalledTransposedBase(layer) if is_called(layer) else TransposedBase(layer)
    return CalledBase(layer) if is_called(layer) else DenseBase(layer)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _linear_part(each: LoraLinear, place: str, config: LoraConfig) -> LoraPart:
    base, r, device = each.base, config.rank(place), _device(each.base)
    kind, shape = config.init_lora_weights, (base.in_features, base.out_features)
    try:
        if needs_weight(kind):
            A, B = from_weight(kind, base.dequantize(), r, config.scaling(place))
        else:
            A, B = initial(kind, *shape, r, device=device)
        part = LoraPart(config, place, A, B)
        if needs_weight(kind):
            part.start_with(A, B)
        each.complete(part)
    except LorakitError as error:
        raise LorakitError(f"attach: {place}: {error}") from None
    return part


# ---- embeddings, and what shares their weight ----


def _embedding(
    plan: Plan, module: nn.Module, places: Places, place: str, config: LoraConfig
) -> None:
    layer = places[place]
    if config.lora_bias:
        raise LorakitError(f"attach: {place} is an embedding, which takes no lora_bias")
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise LorakitError(f"attach: {place} has a max_norm, which changes its weight in use")
    heads = _tied_heads(module, places, layer)
    if heads is not None and not config.ensure_weight_tying:
        raise LorakitError(_tied_message(place))
    if heads is not None and config.use_dora:
        raise LorakitError(f"attach: {place} is tied to the head, where use_dora has no meaning")
    each = plan.wrap(place, layer, LoraEmbedding, lambda: LoraEmbedding(layer))
    if each is None:
        return
    weight = each.base.weight
    H, V = each.base.embedding_dim, each.base.num_embeddings
    r = config.rank(place)
    A = torch.zeros(r, V, device=weight.device)
    B = torch.randn(H, r, device=weight.device)
    part = LoraPart(config, place, A, B)
    if config.use_dora:
        part.magnitude = nn.Parameter(each._column_norms(part))
    plan.parts.append((each, part))
    _tie(plan, places, heads or [], each)


def _tied_message(place: str) -> str:
    return (
        f"attach: {place} shares its weight with the output head; with ensure_weight_tying=true "
        "both are adapted alike and stay one"
    )


def _plain(module: nn.Module) -> nn.Module:
    return module.plain if isinstance(module, Attached) else module


def _weight(module: nn.Module) -> Tensor | None:
    return _plain(module)._parameters.get("weight")


def _tied_heads(module: nn.Module, places: Places, layer: nn.Module) -> list[str] | None:
    """The linear layers that share the weight of embedding `layer`; an empty list where the decoder
    uses the embedding itself as its head; None if there is no such thing.
    """
    layer = _plain(layer)
    if not isinstance(layer, nn.Embedding) and not isinstance(layer, PackedLayer):
        return None
    weight = _weight(layer)
    for name, other in places.items():
        same = weight is not None and _weight(other) is weight
        if same and _is_embedding(other) and _plain(other) is not layer:
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
    return next((n for n, m in places.items() if _is_embedding(m) and _weight(m) is weight), None)


def _tie(plan: Plan, places: Places, heads: list[str], embedding: Attached) -> None:
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
    if packed or isinstance(module, PackedLayer):
        raise LorakitError(
            f"modules_to_save: {place} is packed; only a dense module can be trained"
        )
    if not list(module.parameters()):
        raise LorakitError(f"modules_to_save: {place} has no parameters")
    return copy.deepcopy(module).requires_grad_(True)


def _token_rows(
    places: Places, embeddings: list[str], config: LoraConfig
) -> Iterator[tuple[str, list[int]]]:
    wanted = config.trainable_token_indices
    if wanted is None:
        return
    if isinstance(wanted, list):
        if len(embeddings) != 1:
            there = ", ".join(embeddings) or "none"
            raise LorakitError(
                "trainable_token_indices: a list needs a module with one embedding; name it in a "
                f"mapping. There are: {there}"
            )
        wanted = {embeddings[0]: wanted}
    for entry, ids in wanted.items():
        hits = [n for n in embeddings if ends_with(n, entry)]
        if not hits:
            raise LorakitError(
                f"trainable_token_indices: {entry!r} is no embedding{nearest(entry, embeddings)}"
            )
        for place in hits:
            yield place, ids


def _rows_part(each: TokenRows, place: str, ids: list[int], config: LoraConfig) -> RowsPart:
    V = each.base.num_embeddings
    fits = ids and all(type(i) is int and 0 <= i < V for i in ids) and len(set(ids)) == len(ids)
    if not fits:
        raise LorakitError(
            f"trainable_token_indices: {place} needs different whole numbers from 0 to {V - 1}"
        )
    index = torch.tensor(ids, device=_device(each.base))
    return RowsPart(config, index, each.original_rows(index).clone(), V)
