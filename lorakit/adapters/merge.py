"""Merging: an adapter in the weights, and how far that moves the logits.

Which weights? Where the base is dense there is but one choice. Over a quantized base there are
three, and none is right for all:

    "dequantized"   what the adapter was trained on: the logits move by rounding alone. Dense, as
                    large as the original model
    "dense"         the original weights, read again from where the model was loaded. Dense. Usually
                    the better model, as the error of the quantization is gone; but an adapter that
                    learned to make up for that error (LoftQ does so on purpose) now overshoots
    "nf4"           the merged weights are quantized again: as small as the base, and what the
                    adapter changed by less than half a step of the quantization is lost

So `merge` measures: it says how far the logits of a few tokens are from those before.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorakit.adapters.layers.base import AttachedLinear
from lorakit.adapters.layers.embeddings import LoraEmbedding, TiedHead, TokenRows
from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import check_no_block, having_adapters, put_back
from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor
from lorakit.models.decoder import Decoder
from lorakit.models.hooks import has_own_forward
from lorakit.models.load import dense_weights
from lorakit.models.packed_layers import PackedWeight, packed_layer

BASES = ("dequantized", "dense", "nf4")
TOKENS = 32  # of the drift, where the caller gives none


@dataclass(frozen=True)
class Drift:
    """How far a merge moved the logits of `tokens` positions, where it could be measured: largest
    and mean absolute difference, mean Kullback-Leibler divergence in nats, and at how many
    positions the likeliest token is the same.
    """

    base: str
    tokens: int
    largest: float
    mean: float
    divergence: float
    same_first: int

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

    base: of a quantized layer, what the update is added to: "dequantized", "dense" or "nf4", see
        above. Dense layers know no difference.
    input_ids: int64 [B, T] on which the drift of the logits is measured; a `Decoder` has its own.
    weights: the original [out_features, in_features] of every quantized layer that is adapted, by
        the layer's name, for base="dense"; None reads them from where the model was loaded from.

    Returns the drift, or None for another module without input_ids. Needs memory for the merged
    weights beside the base. `save_model` writes merged weights; `unmerge` returns to base and
    adapter. Raises LorakitError, and leaves everything unmerged, if no adapter is attached or
    selected, an original is missing, or a merged weight is not finite.
    """
    layers = having_adapters(module, "merge")
    if base not in BASES:
        raise LorakitError(f"merge: base is {base!r}; choose one of {', '.join(BASES)}")
    if all(each.selected is None for each in layers.values()):
        raise LorakitError("merge: no adapter is selected")
    check_no_block(module, "merge")
    unmerge(module)
    originals = _originals(module, layers, weights) if base == "dense" else {}
    ids = _few_tokens(module) if input_ids is None and isinstance(module, Decoder) else input_ids
    before = None if ids is None else _logits(module, ids)
    try:
        for name, each in tqdm(layers.items(), desc="merging", disable=None, leave=False):
            if each.selected is not None:
                each.merged = _joined(name, each, base, originals.get(name))
                each.refresh()
        for each in layers.values():  # whose weight is that of a merged embedding
            if isinstance(each, TiedHead) and each.embedding[0].merged is not None:
                each.merged = each.joined(None)
        return None if before is None else _drift(base, before, _logits(module, ids))
    except BaseException:
        unmerge(module)
        raise


def unmerge(module: nn.Module) -> nn.Module:
    """Undo `merge`; the base was never touched. Returns `module`."""
    for each in having_adapters(module, "unmerge").values():
        each.merged = None
        each.refresh()
    return module


def merge_and_unload(module: nn.Module, base: str = "dequantized") -> nn.Module:
    """`merge`, and then plain modules in the place of the adapted ones. There is no way back: base
    and adapters are gone. Returns `module`; raises as `merge` does.
    """
    merge(module, base)
    found = having_adapters(module, "merge_and_unload")
    put_back(module, {name: each.current() for name, each in found.items()})
    return module


def _joined(name: str, each: Attached, base: str, original: LazyTensor | None) -> nn.Module:
    weight = None if original is None else original.read().to(_device(each))
    if has_own_forward(each.plain):
        raise LorakitError(
            f"merge: {name} has a forward of its own (accelerate's hooks?), which would still "
            "compute with the old weight; take that off first"
        )
    merged = each.joined(weight)
    values = (*merged.parameters(), *merged.buffers())
    if not all(torch.isfinite(v).all() for v in values if v.is_floating_point()):
        raise LorakitError(f"merge: the merged weight of {name} holds NaN or infinite values")
    if base == "nf4" and isinstance(each.base, PackedWeight):
        merged = packed_layer(merged, each.base.config)
    return merged


def _device(each: Attached) -> torch.device:
    return next(each.base.parameters()).device


def _originals(
    module: nn.Module, layers: Mapping[str, Attached], weights: Mapping[str, Tensor] | None
) -> dict[str, LazyTensor]:
    """Of the layers that are quantized."""
    kinds = (AttachedLinear, LoraEmbedding, TokenRows)
    packed = {
        name: each
        for name, each in layers.items()
        if isinstance(each, kinds) and isinstance(each.base, PackedWeight)
    }
    if not packed:
        return {}
    found = dense_weights(module, weights, "merge")
    for name, each in packed.items():
        if name not in found:
            raise LorakitError(f"merge: the original weight of {name} is missing")
        if found[name].shape != each.base.shape:
            raise LorakitError(
                f"merge: the original of {name} is {found[name].shape}, the layer {each.base.shape}"
            )
    return {name: found[name] for name in packed}


def _few_tokens(model: Decoder) -> Tensor:
    """Any few, always the same: one row of ids spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
    return ids.to(model.device)


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    """fp32 [tokens, V]"""
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
