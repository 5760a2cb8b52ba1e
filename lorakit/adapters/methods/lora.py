"""LoRA (arXiv:2106.09685): a low-rank update of layers, and what may train beside it.

    y = W x + s B A x        A [r, in] and B [out, r] trained, s = lora_alpha / r

Its config is in config/adapters.py, because run files hold one too. What a layer computes is in
layers/lora.py and layers/embeddings.py, and how A and B start in initialize.py. PEFT writes more of
LoRA than of other methods; peft_files/lora_config.py has that.

The plan goes through the model up to four times, for different things to train:

    target_modules             A and B of a linear layer, or of an embedding
    modules_to_save            whole modules
    trainable_token_indices    some rows of an embedding, or of a head
    bias="all"                 the biases of the modules that none of the above has wrapped
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.initialize import from_weight, initial, needs_weight
from lorakit.adapters.layers.embeddings import (
    HeadRows,
    HeadRowsPart,
    LoraEmbedding,
    RowsPart,
    TokenRows,
)
from lorakit.adapters.layers.lora import LoraLayer, LoraLinear, LoraPart
from lorakit.adapters.layers.quantized_sum import QuantizedSum
from lorakit.adapters.layers.whole_modules import BiasPart, TrainedBias
from lorakit.adapters.merge_aware import merge_quantizer
from lorakit.adapters.methods.method import Method
from lorakit.adapters.modules_to_save import plan_modules_to_save
from lorakit.adapters.peft_files.layout import AdapterFiles
from lorakit.adapters.peft_files.lora_config import (
    FROM_THE_WEIGHT,
    read_lora_config,
    values_of_lora,
)
from lorakit.adapters.plan import Plan, is_linear
from lorakit.adapters.targets import ends_with, is_saved_whole
from lorakit.adapters.tied_weights import (
    embedding_of_head,
    head_of_tied_decoder,
    heads_of_embedding,
    is_embedding,
    original,
)
from lorakit.config.adapters import LoraConfig
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.patterns import in_pattern
from lorakit.models.sharding import gathered

_TIED = (
    "shares its weight with the output head; with ensure_weight_tying=true both are adapted "
    "together and stay one"
)


class Lora(Method[LoraConfig]):
    """The method that adds a low-rank update to a layer's weight."""

    peft_type = "LORA"
    config_type = LoraConfig

    def plan(self, model: nn.Module, config: LoraConfig) -> Plan:
        """Plan A and B of every selected layer, and what else the config trains."""
        plan = Plan(model)
        embeddings = [name for name, each in plan.layers.items() if is_embedding(each)]
        chosen = plan.select(config, embeddings)
        _check_patterns(config, chosen)
        if config.ensure_weight_tying and plan.own_head in chosen:
            chosen = _without_tied_head(plan, chosen)
        for name in chosen:
            if is_embedding(plan.layers[name]):
                _plan_embedding(plan, name, config)
            else:
                _plan_linear(plan, name, config)
        plan_modules_to_save(plan, config, None if config.ensure_weight_tying else _TIED)
        for name, ids in _token_ids(plan, embeddings, config.trainable_token_indices):
            _plan_token_rows(plan, name, ids, config)
        if config.bias == "all":
            _plan_other_biases(plan, config)
        return plan

    def config_values(self, model: nn.Module, name: str, config: LoraConfig) -> dict[str, Any]:
        """Return the config of plain LoRA; see peft_files/lora_config.py."""
        return values_of_lora(model, name, config)

    def read_config(self, files: AdapterFiles, model: nn.Module) -> LoraConfig:
        """Return the config that lorakit's LoRA needs to compute what the file means."""
        return read_lora_config(files, model)

    def takes_from_the_base(self, config: LoraConfig) -> bool:
        """Return whether the adapter starts from the weight."""
        return config.init_lora_weights in FROM_THE_WEIGHT


def _without_tied_head(plan: Plan, chosen: Sequence[str]) -> list[str]:
    """Return the chosen layers without the head, which follows its embedding.

    Raises LorakitError if the embedding is not among them.
    """
    head = plan.own_head
    assert head is not None
    embedding = embedding_of_head(plan.layers, plan.layers.pop(head))
    if embedding not in chosen:
        raise LorakitError(
            f"attach: {head} shares its weight with model.embed_tokens, and ensure_weight_tying "
            "keeps them one: adapt model.embed_tokens, or the head alone without it"
        )
    plan.own_head = None
    return [name for name in chosen if name != head]


def _check_patterns(config: LoraConfig, chosen: Sequence[str]) -> None:
    """Raise LorakitError for an entry of rank_pattern or alpha_pattern that matches nothing."""
    patterns: dict[str, Mapping[str, Any]] = {
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    for what, pattern in patterns.items():
        for key in pattern:
            if not any(in_pattern(key, name) for name in chosen):
                hint = nearest(key, [name.rpartition(".")[2] for name in chosen])
                raise LorakitError(f"{what}: {key!r} matches no adapted layer{hint}")


# ---- A and B ----


def _plan_linear(plan: Plan, name: str, config: LoraConfig) -> None:
    """Plan A and B of the linear layer `name`."""
    if name != plan.own_head:
        plan.check_linear(name, "adapt that one, with ensure_weight_tying")
    layer = plan.wrap_linear(name, LoraLinear)
    if layer is None:
        return
    r, scaling = config.rank_and_scaling(name)
    try:
        part = _linear_part(layer, config, r, scaling)
        layer.complete(part)
        if config.quantize_aware is not None:
            quantizer = merge_quantizer(config.quantize_aware, plan.model, name, layer.base)
            part.rounding = QuantizedSum(quantizer)
    except LorakitError as error:
        raise LorakitError(f"attach: {name}: {error}") from None
    plan.add(layer, part)


def _linear_part(layer: LoraLinear, config: LoraConfig, r: int, scaling: float) -> LoraPart:
    """Return a part whose A and B start as `init_lora_weights` says."""
    kind, base = config.init_lora_weights, layer.base
    if isinstance(kind, str) and needs_weight(kind):
        A, B = from_weight(kind, base.dequantize(), r, scaling)
        part = LoraPart(config, scaling, A, B)
        part.start_with(A, B)
        return part
    A, B = initial(kind, base.in_features, base.out_features, r, device=layer.device)
    return LoraPart(config, scaling, A, B)


def _plan_embedding(plan: Plan, name: str, config: LoraConfig) -> None:
    """Plan A and B of the embedding `name`, and tie its heads to it."""
    embedding = plan.layers[name]
    if config.quantize_aware is not None:
        raise LorakitError(f"attach: {name} is an embedding, which quantize_aware leaves out")
    if config.lora_bias:
        raise LorakitError(f"attach: {name} is an embedding, which takes no lora_bias")
    if isinstance(embedding, nn.Embedding) and embedding.max_norm is not None:
        raise LorakitError(f"attach: {name} has a max_norm, which changes its weight in use")
    heads = heads_of_embedding(plan.model, plan.layers, embedding)
    if heads is not None and not config.ensure_weight_tying:
        raise LorakitError(f"attach: {name} {_TIED}")
    if heads is not None and config.use_dora:
        raise LorakitError(f"attach: {name} is tied to the head, where use_dora has no meaning")
    layer = plan.wrap(name, LoraEmbedding)
    if layer is None:
        return
    r, scaling = config.rank_and_scaling(name)
    device = layer.device
    A = torch.zeros(r, layer.base.num_embeddings, device=device)
    B = torch.randn(layer.base.embedding_dim, r, device=device)
    part = LoraPart(config, scaling, A, B)
    if config.use_dora:
        with gathered(layer.base):
            part.magnitude = nn.Parameter(layer.column_norms(part))
    plan.add(layer, part)
    plan.tie_heads(heads or [], layer)


# ---- rows and biases ----


def _token_ids(
    plan: Plan, embeddings: Sequence[str], wanted: Sequence[int] | Mapping[str, list[int]] | None
) -> Iterator[tuple[str, list[int]]]:
    """Yield each embedding or head that trainable_token_indices means, with its tokens.

    A head that is tied to an embedding follows that one, and is left out.
    """
    if wanted is None:
        return
    if not isinstance(wanted, Mapping):
        if len(embeddings) != 1:
            there = ", ".join(embeddings) or "none"
            raise LorakitError(
                "trainable_token_indices: a list needs a module with one embedding; name it in a "
                f"mapping. There are: {there}"
            )
        wanted = {embeddings[0]: list(wanted)}
    for entry, ids in wanted.items():
        layers = [n for n, each in plan.layers.items() if n in embeddings or is_linear(each)]
        hits = [name for name in layers if ends_with(name, entry)]
        if not hits and entry == "lm_head" and head_of_tied_decoder(plan.model) is not None:
            _check_same_tokens("model.embed_tokens", ids, wanted)
        elif not hits:
            raise LorakitError(
                f"trainable_token_indices: {entry!r} is no embedding{nearest(entry, embeddings)}"
            )
        for name in hits:
            embedding = embedding_of_head(plan.layers, plan.layers[name])
            if embedding is None:
                yield name, ids
            else:
                _check_same_tokens(embedding, ids, wanted)


def _check_same_tokens(embedding: str, ids: list[int], wanted: Mapping[str, list[int]]) -> None:
    """Raise LorakitError unless a tied head has the same trained tokens as its embedding."""
    others = [each for name, each in wanted.items() if ends_with(embedding, name)]
    if not any(sorted(each) == sorted(ids) for each in others):
        raise LorakitError(
            f"trainable_token_indices: the head shares its weight with {embedding}; give both the "
            "same tokens"
        )


def _plan_token_rows(plan: Plan, name: str, ids: list[int], config: LoraConfig) -> None:
    """Plan the rows of tokens `ids` of an embedding or a head, and tie an embedding's heads."""
    if is_saved_whole(name, config) or isinstance(plan.wrapper_of(name), LoraLayer):
        raise LorakitError(
            f"trainable_token_indices: {name} is among target_modules or modules_to_save too; "
            "keep one of them"
        )
    if not is_embedding(plan.layers[name]):
        head = plan.wrap_linear(name, HeadRows)
        if head is not None:
            index = _checked_tokens(name, ids, head.out_features, head.device)
            rows = head.base.dequantize()[index].detach().float()
            plan.add(head, HeadRowsPart(config, index, rows, head.out_features))
        return
    layer = plan.wrap(name, TokenRows)
    if layer is None:
        return
    V = layer.base.num_embeddings
    index = _checked_tokens(name, ids, V, layer.device)
    with gathered(layer.base):
        rows = layer.original_rows(index).clone()
    plan.add(layer, RowsPart(config, index, rows, V))
    heads = heads_of_embedding(plan.model, plan.layers, plan.layers[name])
    plan.tie_heads(heads or [], layer)


def _checked_tokens(name: str, ids: list[int], V: int, device: torch.device) -> Tensor:
    """Return the tokens as int64 [n]; raise LorakitError unless they are n of V tokens."""
    fits = ids and all(type(i) is int and 0 <= i < V for i in ids) and len(set(ids)) == len(ids)
    if not fits:
        raise LorakitError(
            f"trainable_token_indices: {name} needs different whole numbers from 0 to {V - 1}"
        )
    return torch.tensor(ids, device=device)


def _plan_other_biases(plan: Plan, config: LoraConfig) -> None:
    """Plan the biases of the modules that the plan has not wrapped so far."""
    for name, module in plan.layers.items():
        plain = original(module)
        bias = plain._parameters.get("bias")
        if bias is None or plan.wrapper_of(name) is not None or is_saved_whole(name, config):
            continue
        if next(plain.children(), None) is not None:
            raise LorakitError(
                f"bias: {name} has a bias of its own beside the modules in it, which 'all' cannot "
                "train; choose 'lora_only' or 'none'"
            )
        wrapper = plan.wrap(name, TrainedBias)
        if wrapper is not None:
            plan.add(wrapper, BiasPart(bias))
