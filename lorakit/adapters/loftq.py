"""LoftQ: an adapter that starts from the error of the quantization (arXiv:2310.08659).

A quantized model with a fresh adapter computes Q x where the original computed W x. LoftQ starts A
and B, and after the first iteration Q too, from

    minimize  || W - Q - s B A ||_F        alternately, from A = B = 0:

    Q = quantize(W - s B A)
    s B A = the best rank-r approximation of W - Q

One iteration leaves the codes as they were: the adapter then fits whatever loads W in the same
format. More iterations change the base, and the adapter fits this base alone (save it too, with
`save_model(..., packed=True)`).

The approximation is found by subspace iteration with 2 r vectors (arXiv:0909.4061, algorithm 4.4):
some products with the residue instead of its whole singular value decomposition. The error of a
quantization is nearly noise, with singular values close to each other. What rank r can hold of it
is found to 2 percent (a test checks it).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorakit.adapters.initialize import subspace_svd
from lorakit.adapters.layers.base import DenseBase
from lorakit.adapters.layers.lora import LoraLayer, LoraLinear, lora_layers
from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor
from lorakit.models.decoder import Decoder
from lorakit.models.load import dense_weights

_SUBSPACE_ITERATIONS = 8


@dataclass(frozen=True)
class LoftQResult:
    """The relative errors || W - W' ||_F / || W ||_F of the layers before and after LoftQ.

    It prints as one line.
    """

    before: dict[str, float]
    """The error of each quantized layer by its name, without the adapter, as loaded."""
    after: dict[str, float]
    """The error of each quantized layer by its name, with the adapter."""

    def __str__(self) -> str:
        n = len(self.before)
        before, after = (sum(errors.values()) / n for errors in (self.before, self.after))
        return f"LoftQ: mean relative error of {n} layers {before:.4f} -> {after:.4f}"


@torch.no_grad()
def loftq(
    module: nn.Module, weights: Mapping[str, Tensor] | None = None, *, iterations: int = 1
) -> LoftQResult:
    """Start the selected LoRA adapter from the quantization error of its layers (arXiv:2310.08659).

    The values that the adapter held are lost. Everything is computed on the layers' device. Layers
    that the quantization left dense, as the router of experts, have no error and stay as they are.

    Args:
        module: The quantized model that the adapter is attached to.
        weights: The original weight [out_features, in_features] of every adapted layer that is
            quantized, by the layer's name. None reads them again, one at a time, from where the
            model was loaded.
        iterations: How often the adapter is fitted; each one after the first quantizes the base
            again.

    Returns:
        The relative error of each quantized layer before and after.

    Raises:
        LorakitError: No adapter is attached or it is merged, all layers are dense, or an original
            is missing or of another shape; nothing has changed then. Or an original holds NaN or
            infinite values, which is found when its turn comes; the layers before it are started
            then.
    """
    selected = {n: each for n, each in lora_layers(module).items() if each.selected is not None}
    if not selected:
        raise LorakitError("loftq: no adapter is attached")
    if type(iterations) is not int or iterations < 1:
        raise LorakitError(f"loftq: iterations must be a whole number from 1 on, not {iterations}")
    source = module.source if isinstance(module, Decoder) else None
    originals = dense_weights(source, weights, "loftq")
    kept = {n: each for n, each in selected.items() if _is_dense(each)}
    if len(kept) == len(selected):
        raise LorakitError(
            f"loftq: {next(iter(kept))} is dense; quantize the model before attaching"
        )
    layers = {n: _checked(n, each, originals) for n, each in selected.items() if n not in kept}
    for layer in kept.values():
        layer.part.awaits = None
    before, after = {}, {}
    for name, layer in tqdm(layers.items(), desc="LoftQ", unit="layer", disable=None, leave=False):
        original = originals[name].read().to(layer.lora_A.device, torch.float32)
        if not torch.isfinite(original).all():
            raise LorakitError(f"loftq: the original weight of {name} holds NaN or infinite values")
        before[name], after[name] = _start(layer, original, iterations)
    return LoftQResult(before, after)


def _is_dense(layer: LoraLayer) -> bool:
    return isinstance(layer, LoraLinear) and isinstance(layer.base, DenseBase)


def _checked(name: str, layer: LoraLayer, originals: Mapping[str, LazyTensor]) -> LoraLinear:
    """Return the layer called `name` if LoftQ can start it; raise LorakitError otherwise."""
    if not isinstance(layer, LoraLinear):
        raise LorakitError(f"loftq: {name} is an embedding; leave it out of target_modules")
    if layer.merged is not None:
        raise LorakitError(f"loftq: the adapter of {name} is merged; unmerge it first")
    if layer.part.scaling == 0:
        raise LorakitError("loftq: lora_alpha is 0, which hides whatever the adapter holds")
    if name not in originals:
        raise LorakitError(f"loftq: the original weight of {name} is missing")
    shape = (layer.base.out_features, layer.base.in_features)
    if originals[name].shape != shape:
        raise LorakitError(
            f"loftq: the original of {name} is {originals[name].shape}, the layer {shape}"
        )
    return layer


def _start(layer: LoraLinear, original: Tensor, iterations: int) -> tuple[float, float]:
    """Fit A and B of a layer, and from the second iteration on its base too.

    Returns the relative errors before and after.
    """
    A, B, s, r = layer.lora_A, layer.lora_B, layer.part.scaling, layer.part.r
    norm = original.norm().clamp(min=torch.finfo(torch.float32).tiny)
    rank = min(r, *original.shape)
    for iteration in range(iterations):
        if iteration > 0:
            layer.base.requantize(torch.addmm(original, B.float(), A.float(), alpha=-s))
        residue = original - layer.base.dequantize().float()
        if iteration == 0:
            before = (residue.norm() / norm).item()
        width = min(2 * r, *original.shape)
        U, S, Vt = subspace_svd(residue, rank, width=width, iterations=_SUBSPACE_ITERATIONS)
        root = S.sqrt()
        A.zero_()[:rank] = root[:, None] * Vt
        B.zero_()[:, :rank] = U * (root / s)
    layer.start_over(layer.part)
    after = (residue.addmm_(B.float(), A.float(), alpha=-s).norm() / norm).item()
    return before, after
