"""Merge an adapter into the weights, and measure how far that moves the logits.

Over a dense base there is one way to merge. Over a quantized base there are three weights to merge
into, and none is right for all:

    "dequantized"   the weights that the adapter was trained on. The logits move by rounding alone.
                    The result is dense, as large as the original model
    "dense"         the original weights, read again from where the model was loaded. The result is
                    dense, and usually the better model, as the error of the quantization is gone.
                    But an adapter that learned to make up for that error (LoftQ does so on purpose)
                    now overshoots
    "nf4"           the merged weights are quantized again. The result is as small as the base, and
                    what the adapter changed by less than half a step of the quantization is lost,
                    unless it was trained with quantize_aware (merge_aware.py)

So `merge` measures: it says how far the logits of a few tokens are from those before.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorakit.adapters.layers.base import AttachedLinear
from lorakit.adapters.layers.embeddings import AttachedEmbedding, TiedHead
from lorakit.adapters.layers.lora import LoraPart, lora_layers
from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import check_no_block, put_back, require_attached
from lorakit.adapters.merge_aware import without_rounding
from lorakit.config.errors import LorakitError
from lorakit.config.quantization import QuantConfig
from lorakit.files.safetensors import LazyTensor
from lorakit.models.decoder import Decoder
from lorakit.models.hooks import has_own_forward
from lorakit.models.load import dense_weights
from lorakit.models.packed_layers import PackedWeight, packed_layer
from lorakit.models.sharding import divide_like, gathered

BASES = ("dequantized", "dense", "nf4")
_TOKENS = 32  # the drift is measured on so many, where the caller gives none


@dataclass(frozen=True)
class Drift:
    """How far a merge moved the logits of some tokens."""

    base: str
    """The weights that were merged into: "dequantized", "dense" or "nf4"; of `rounding_drift` the
    adapter's quantize_aware."""
    tokens: int
    """How many positions were compared."""
    largest: float
    """The largest absolute difference of a logit."""
    mean: float
    """The mean absolute difference of the logits."""
    divergence: float
    """The mean Kullback-Leibler divergence from before to after, in nats."""
    same_first: int
    """How many positions have the same likeliest token before and after."""

    def __str__(self) -> str:
        return (
            f"merged on {self.base} weights: logits of {self.tokens} tokens moved by "
            f"{self.mean:.2e} in the mean, {self.largest:.2e} at most; KL {self.divergence:.2e}; "
            f"{self.same_first} of {self.tokens} likeliest tokens are the same"
        )


@torch.no_grad()
def merge(
    module: nn.Module,
    base: str = "dequantized",
    *,
    input_ids: Tensor | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Drift | None:
    """Let every adapted layer compute with one weight that holds base and selected adapter.

    This needs memory for the merged weights beside the base; those of a sharded model are sharded
    too, and all ranks must call it. `save_model` writes merged weights;
    `unmerge` returns to base and adapter.

    Args:
        module: A module with adapters.
        base: What the update of a quantized layer is added to: "dequantized", the weights that the
            adapter was trained on; "dense", the original weights; or "nf4", the dequantized
            weights, with the sum quantized again. For dense layers the three are the same, except
            that "nf4" packs those that an adapter with quantize_aware "nf4" is on.
        input_ids: Tokens on which the drift of the logits is measured, int64 [B, T]. None takes a
            few of a `Decoder`'s vocabulary, and measures nothing on another module.
        weights: The original weight [out_features, in_features] of every quantized layer that is
            adapted, by the layer's name, for base="dense". None reads them from where the model was
            loaded.

    Returns:
        The drift of the logits, or None where nothing was measured.

    Raises:
        LorakitError: `base` is unknown, no adapter is attached or selected, adapters are disabled
            or differ by row, an original is missing or of another shape, or a merged weight is not
            finite. Nothing is merged then.
    """
    layers = require_attached(module, "merge")
    if base not in BASES:
        raise LorakitError(f"merge: base is {base!r}; choose one of {', '.join(BASES)}")
    if all(each.selected is None for each in layers.values()):
        raise LorakitError("merge: no adapter is selected")
    check_no_block(module, "merge")
    unmerge(module)
    originals = _originals(module, layers, weights) if base == "dense" else {}
    ids = _few_tokens(module) if input_ids is None and isinstance(module, Decoder) else input_ids
    try:
        before = None if ids is None else _logits(module, ids)
        _merge_layers(layers, base, originals)
        if ids is None or before is None:
            return None
        return _drift(base, before, _logits(module, ids))
    except BaseException:
        unmerge(module)
        raise


def unmerge(module: nn.Module) -> nn.Module:
    """Undo `merge`, so that the module computes with base and adapter again.

    The base was never touched, so the outputs are those of before, to the bit.

    Args:
        module: A module with adapters, merged or not.

    Returns:
        `module`.

    Raises:
        LorakitError: No adapter is attached.
    """
    for each in require_attached(module, "unmerge").values():
        each.set_merged(None)
    return module


def merge_and_unload(module: nn.Module, base: str = "dequantized") -> nn.Module:
    """Merge the selected adapter, and put plain modules in the place of the adapted ones.

    There is no way back: base and adapters are gone.

    Args:
        module: A module with adapters.
        base: What the update of a quantized layer is added to, as in `merge`.

    Returns:
        `module`.

    Raises:
        LorakitError: `merge` refuses.
    """
    merge(module, base)
    found = require_attached(module, "merge_and_unload")
    put_back(module, {name: each.current_module() for name, each in found.items()})
    return module


def _merge_layers(
    layers: Mapping[str, Attached], base: str, originals: Mapping[str, LazyTensor]
) -> None:
    """Merge the selected part of each layer, then the heads that share an embedding's weight."""
    for name, each in tqdm(layers.items(), desc="merging", disable=None, leave=False):
        if each.selected is not None:
            each.set_merged(_merged(name, each, base, originals.get(name)))
    for each in layers.values():
        if isinstance(each, TiedHead) and each.embedding.merged is not None:
            each.set_merged(each.make_merged(None))


def _merged(name: str, each: Attached, base: str, original: LazyTensor | None) -> nn.Module:
    """Return the merged layer called `name`; `original` takes the place of the base's weight."""
    weight = None if original is None else original.read().to(each.device)
    if has_own_forward(each.original):
        raise LorakitError(
            f"merge: {name} has a forward of its own (accelerate's hooks?), which would still "
            "compute with the old weight; take that off first"
        )
    with gathered(each.base):
        merged = each.make_merged(weight)
    added = isinstance(each, AttachedLinear) and each.base.bias is None
    if added and merged._parameters.get("bias") is not None:
        raise LorakitError(
            f"merge: {name} has no bias to add the adapter's lora_bias to, and the model's files "
            "have no place for one: keep the adapter beside the model"
        )
    values = (*merged.parameters(), *merged.buffers())
    if not all(torch.isfinite(v).all() for v in values if v.is_floating_point()):
        raise LorakitError(f"merge: the merged weight of {name} holds NaN or infinite values")
    config = _packed_as(each) if base == "nf4" else None
    if config is not None:
        assert isinstance(merged, (nn.Linear, nn.Embedding))  # packed ones merge into these
        merged = packed_layer(merged, config)
    if isinstance(each, (AttachedLinear, AttachedEmbedding)):  # the others' parts are whole
        divide_like(merged, next(each.original.parameters()))
    return merged


def _packed_as(layer: Attached) -> QuantConfig | None:
    """Return how the merged layer is packed on the base "nf4"; None: it stays dense."""
    if isinstance(layer.base, PackedWeight):
        return layer.base.config
    part = layer.part
    aware = isinstance(part, LoraPart) and part.rounding is not None
    return QuantConfig() if aware and part.config.quantize_aware == "nf4" else None


def rounding_drift(model: Decoder) -> Drift | None:
    """Return how far the quantization of a merge moves the logits, for merge-aware training.

    Those before are of the sums of base and update as they are, those after of the quantized sums,
    which the model computes with. The result is None if the selected adapter has no quantize_aware.
    """
    kinds = {
        layer.active.config.quantize_aware
        for layer in lora_layers(model).values()
        if layer.active is not None and layer.active.rounding is not None
    }
    if not kinds:
        return None
    ids = _few_tokens(model)
    with torch.no_grad():
        with without_rounding(model):
            before = _logits(model, ids)
        return _drift(kinds.pop(), before, _logits(model, ids))


def _originals(
    module: nn.Module, layers: Mapping[str, Attached], weights: Mapping[str, Tensor] | None
) -> dict[str, LazyTensor]:
    """Return the original weight of each layer that is quantized, by the layer's name."""
    packed = {
        name: each.base
        for name, each in layers.items()
        if isinstance(each, (AttachedLinear, AttachedEmbedding))
        and isinstance(each.base, PackedWeight)
    }
    if not packed:
        return {}
    source = module.source if isinstance(module, Decoder) else None
    found = dense_weights(source, weights, "merge")
    if "lm_head" in packed and "lm_head" not in found and "model.embed_tokens" in found:
        found["lm_head"] = found["model.embed_tokens"]  # a tied model's, adapted by itself
    for name, layer in packed.items():
        if name not in found:
            raise LorakitError(f"merge: the original weight of {name} is missing")
        if found[name].shape != layer.shape:
            raise LorakitError(
                f"merge: the original of {name} is {found[name].shape}, the layer {layer.shape}"
            )
    return {name: found[name] for name in packed}


def _few_tokens(model: Decoder) -> Tensor:
    """Return one row of random ids of the vocabulary, which are the same in each call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, _TOKENS), generator=generator)
    return ids.to(model.device)


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits of `ids` in evaluation mode, fp32 [tokens, V]."""
    training = {each: each.training for each in module.modules()}
    module.eval()
    try:
        found = module(ids)
    finally:
        for each, before in training.items():
            each.training = before
    if not isinstance(found, Tensor):
        found = found.logits  # as the models of transformers return them
    return found.flatten(0, -2).float()


def _drift(base: str, before: Tensor, after: Tensor) -> Drift:
    """Compare logits fp32 [tokens, V]."""
    difference = (after - before).abs()
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    return Drift(
        base,
        len(before),
        difference.max().item(),
        difference.mean().item(),
        divergence.mean().item(),
        int((before.argmax(-1) == after.argmax(-1)).sum()),
    )
