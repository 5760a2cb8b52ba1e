"""Carried out of lorakit/attaching.py."""

from collections.abc import Iterator

import torch
from torch import nn

from lorakit.adapters.initialize import from_weight, initial, needs_weight
from lorakit.adapters.layers.embeddings import LoraEmbedding, RowsPart, TokenRows
from lorakit.adapters.layers.lora import LoraLinear, LoraPart
from lorakit.adapters.layers.whole_modules import BiasPart, TrainedBias
from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import outer_modules
from lorakit.adapters.plan import (
    Places,
    Plan,
    base_of,
    check_linear,
    device_of,
    found_modules,
    is_embedding,
    is_linear,
    save_whole,
    tie_heads,
    tied_heads,
    tied_message,
    within_saved,
)
from lorakit.adapters.targets import ends_with, select
from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.patterns import lies_in


def plan_lora(module: nn.Module, config: LoraConfig) -> Plan:
    places = {n: m for n, m in outer_modules(module) if n}
    linear = [n for n, m in places.items() if is_linear(m, config)]
    embeddings = [n for n, m in places.items() if is_embedding(m)]
    plan = Plan()
    for place in select(linear + within_saved(places), embeddings, config):
        layer = found_modules(places, place)
        if is_embedding(layer):
            _embedding(plan, module, places, place, config)
            continue
        check_linear(places, place, "adapt that one, with ensure_weight_tying")
        each = plan.wrap(place, layer, LoraLinear, lambda layer=layer: LoraLinear(base_of(layer)))
        if each is not None:
            plan.parts.append((each, _linear_part(each, place, config)))
    save_whole(plan, module, config, config.ensure_weight_tying)
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
            tie_heads(plan, places, tied_heads(module, places, layer) or [], each)
    if config.bias == "all":
        for place, layer in places.items():
            plain = layer.original if isinstance(layer, Attached) else layer
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


def _linear_part(each: LoraLinear, place: str, config: LoraConfig) -> LoraPart:
    base, device = each.base, device_of(each.base)
    r, scaling = config.rank_and_scaling(place)
    kind, shape = config.init_lora_weights, (base.in_features, base.out_features)
    try:
        if needs_weight(kind):
            A, B = from_weight(kind, base.dequantize(), r, scaling)
        else:
            A, B = initial(kind, *shape, r, device=device)
        part = LoraPart(config, scaling, A, B)
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
    heads = tied_heads(module, places, layer)
    if heads is not None and not config.ensure_weight_tying:
        raise LorakitError(tied_message(place))
    if heads is not None and config.use_dora:
        raise LorakitError(f"attach: {place} is tied to the head, where use_dora has no meaning")
    each = plan.wrap(place, layer, LoraEmbedding, lambda: LoraEmbedding(layer))
    if each is None:
        return
    weight = each.base.weight
    H, V = each.base.embedding_dim, each.base.num_embeddings
    r, scaling = config.rank_and_scaling(place)
    A = torch.zeros(r, V, device=weight.device)
    B = torch.randn(H, r, device=weight.device)
    part = LoraPart(config, scaling, A, B)
    if config.use_dora:
        part.magnitude = nn.Parameter(each.column_norms(part))
    plan.parts.append((each, part))
    tie_heads(plan, places, heads or [], each)


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
    index = torch.tensor(ids, device=device_of(each.base))
    return RowsPart(config, index, each.original_rows(index).clone(), V)
