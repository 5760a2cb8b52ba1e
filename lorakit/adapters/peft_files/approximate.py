"""Approximate a DoRA layer by plain LoRA.

DoRA scales row i of the adapted weight to length m_i, so m / ||W + s B A|| (W + s B A) has no
finite rank in general. With g = m / ||W + s B A||, row by row, the update is

    delta = diag(g) (W + s B A) - W = diag(g - 1) W + s diag(g) B A

and the second form has no cancellation. Rank r of it is the LoRA part, and what the magnitudes add
is spread over all singular values of W. Twice the rank is therefore a compromise and not a proof:
the relative error || delta - B' A' ||_F / || delta ||_F is reported for each layer, never left out.

The approximation is torch's truncated randomized singular value decomposition, by the algorithm of
`subspace_svd` (adapters/initialize.py). It computes in fp32 and draws from a seed of its own, so
equal files give equal bytes. Memory holds one layer.
"""

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit import kernels
from lorakit.adapters.peft_files.stored import StoredLayer, read_finite
from lorakit.config.errors import LorakitError, nearest
from lorakit.files.safetensors import LazyTensor
from lorakit.models.bitsandbytes import LazyWeight
from lorakit.models.config import ModelConfig
from lorakit.models.multimodal import text_name

_SUBSPACE_ITERATIONS = 8


class BaseModel(NamedTuple):
    """The model that an adapter belongs to: its config, and its weights, still on disk."""

    path: str | Path
    config: ModelConfig
    tensors: Mapping[str, LazyWeight]
    towers: Set[str]  # the modules of its other towers, by their names in the files


class Approximation(NamedTuple):
    """The best A and B of some rank for the update of a layer, and how good they are."""

    a: Tensor  # fp32 [r', in]
    b: Tensor  # fp32 [out, r']
    missed: float  # || delta - B A ||_F^2
    whole: float  # || delta ||_F^2


def approximate_dora(path: Path, layer: StoredLayer, base: BaseModel, rank: int) -> Approximation:
    """Return the best A and B of `rank`, or less, for the update of a DoRA layer.

    Raises LorakitError, naming the adapter's `path`, if the base has no such layer, or a value is
    not finite.
    """
    assert layer.magnitude is not None
    weight = _base_weight(path, layer, layer.magnitude, base)
    a, b, m = (read_finite(path, layer, t) for t in (layer.a, layer.b, layer.magnitude))
    adapted = torch.addmm(weight, b, a, alpha=layer.scaling)
    norm = torch.linalg.vector_norm(adapted, dim=1, dtype=torch.float64)
    # A row of zeros stays a row of zeros, whatever its magnitude.
    g = torch.where(norm > 0, m.double() / norm, 1.0)
    delta = (g - 1).float()[:, None] * weight
    delta.addmm_((layer.scaling * g).float()[:, None] * b, a)
    if not torch.isfinite(delta).all():
        raise LorakitError(f"{path}: the update of {layer.name} is not finite")
    whole = delta.double().square().sum().item()
    kept = min(rank, *delta.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = min(2 * kept, *delta.shape)
        U, S, V = torch.svd_lowrank(delta, q=width, niter=_SUBSPACE_ITERATIONS)
    root = S[:kept].sqrt()
    a, b = root[:, None] * V[:, :kept].t(), U[:, :kept] * root
    missed = delta.addmm_(b, a, alpha=-1).double().square().sum().item()
    return Approximation(a, b, missed, whole)


def published_name(name: str, config: ModelConfig) -> str:
    """Return the name of a layer in the model's files.

    transformers 5 calls every block of experts `mlp`; the files keep the family's own name.
    """
    block = config.moe_names[0]
    if block not in ("mlp", "") and config.num_experts:
        return re.sub(r"(\.layers\.\d+)\.mlp\.", rf"\1.{block}.", name)
    return name


def _base_weight(path: Path, layer: StoredLayer, magnitude: LazyTensor, base: BaseModel) -> Tensor:
    """Return W of an adapted layer, [out, in] in fp32."""
    name = text_name(published_name(layer.name, base.config)) + ".weight"
    if name == "lm_head.weight" and base.config.tie_word_embeddings:
        name = "model.embed_tokens.weight"
    if name not in base.tensors:
        raise LorakitError(
            f"{path}: layer {layer.name} is none of {base.path}{nearest(name, base.tensors)}"
        )
    stored, shape = base.tensors[name], (layer.b.shape[0], layer.a.shape[1])
    if stored.shape != shape or magnitude.shape != shape[:1]:
        raise LorakitError(
            f"{path}: the adapter of {layer.name} is for a weight {shape} and has "
            f"{magnitude.shape} magnitudes, {base.path} has {stored.shape}"
        )
    values = stored.read()
    if isinstance(values, Tensor):
        return values.float()
    return kernels.dequantize(values, torch.float32)
