"""An adapter that any server understands, made of one that only PEFT does.

adapter_config.json can say much that most servers do not read. `convert_adapter` writes what all of
them read, plain LoRA: one r, one integer lora_alpha, the full names of the layers. Per layer the
update of the weight stays s B A, with

    rank_pattern         smaller ranks are filled with zero rows of A and columns of B: exact
    alpha_pattern,       B' = (s r' / lora_alpha') B, one rounding to fp32 of every value of B; not
      rsLoRA             even that where all layers share an s and s r' is a whole number
    fused experts        the slices of A and B of each expert, under the experts' published names
    DoRA                 m / ||W + s B A|| (W + s B A) has no finite rank in general: the base is
                         needed, and the best approximation is written

DoRA scales row i of the adapted weight to length m_i. With g = m / ||W + s B A||, row by row,

    delta = diag(g) (W + s B A) - W = diag(g - 1) W + s diag(g) B A

the second form without cancellation. Rank r of it is the LoRA part, what the magnitudes add is
spread over all singular values of W, so twice the rank is a compromise and not a proof: the
relative error || delta - B' A' ||_F / || delta ||_F is reported per layer, never left out. The
approximation is the truncated randomized singular value decomposition that LoftQ uses, in fp32,
from a seed of its own: the same files give the same bytes. Memory holds the adapter and one layer.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lorakit import kernels
from lorakit.adapters.peft_files import features
from lorakit.adapters.peft_files.experts import split_experts
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lorakit.adapters.peft_files.stored import StoredAdapter as Adapter
from lorakit.adapters.peft_files.stored import StoredLayer as Layer
from lorakit.adapters.peft_files.stored import natural, open_adapter, some
from lorakit.config.adapters import PLAIN_INITIALIZATIONS
from lorakit.config.errors import LorakitError, nearest
from lorakit.files.local import as_path, write_json
from lorakit.files.safetensors import LazyTensor, write_safetensors
from lorakit.models.config import ModelConfig
from lorakit.models.load import open_model
from lorakit.models.multimodal import text_name

SUBSPACE_ITERATIONS = 8


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_adapter` wrote."""

    target: str
    layers: int
    r: int
    lora_alpha: int
    changes: list[str]
    """what was folded, split, left out or approximated"""
    errors: dict[str, float] = field(default_factory=dict)
    """of a DoRA adapter, || delta - B' A' ||_F / || delta ||_F of each layer"""
    relative_error: float = 0.0
    """the same over all layers; 0 for an exact conversion"""

    def __str__(self) -> str:
        lines = []
        if self.errors:
            width = max(len("layer"), *map(len, self.errors))
            lines = [f"{'layer':{width}}  {'error':>8}"]
            lines += [f"{name:{width}}  {error:8.5f}" for name, error in self.errors.items()]
            lines += [""]
        lines += self.changes
        how = f"relative error {self.relative_error:.5f}" if self.errors else "exact"
        lines.append(
            f"{self.layers} layers, r={self.r}, lora_alpha={self.lora_alpha}, {how}, "
            f"in {self.target}"
        )
        return "\n".join(lines)


class _Plain(NamedTuple):
    """A layer of the converted adapter: s B A, in fp32."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scaling: float
    embedding: bool


@torch.no_grad()
def convert_adapter(
    source: str | Path,
    target: str | Path,
    *,
    base_model: str | Path | None = None,
    rank: int | None = None,
) -> ConversionReport:
    """Write the adapter in directory `source` to directory `target` as plain LoRA in fp32: one r,
    one lora_alpha, no patterns, rsLoRA or DoRA, target_modules the full names of the layers.

    base_model: a model directory, .gguf file or Hub id. Needed for DoRA, whose update depends on
        the weights (packed ones are dequantized), and for fused experts, which it names.
    rank: of what is written. None: the largest rank of a layer; for DoRA, which is approximated,
        twice that. A larger one than needed is filled with zeros.

    Everything but DoRA is exact (up to a rounding of B to fp32). A lora_bias of zeros and a bias
    setting without biases in the file are dropped; so are copies of base weights. Returns what was
    done, with DoRA's errors.

    Raises LorakitError, and writes nothing, for what plain LoRA cannot hold (biases,
    modules_to_save, trained tokens, initializations that changed the base, ...), a missing or
    damaged file, NaN, a rank too small, or a target that is not new or empty.
    """
    source, target = as_path(source), as_path(target).resolve()  # not a link to it
    _check_target(source, target)
    adapter = open_adapter(source)
    _check_plain(adapter)
    config, tensors = None, {}
    dora = [layer for layer in adapter.layers if layer.magnitude is not None]
    fused = [layer for layer in adapter.layers if layer.experts]
    if (dora or fused) and base_model is None:
        why = "DoRA scales the weights of the base" if dora else "the base's config names experts"
        raise LorakitError(f"{source}: {why}: give base_model (--base-model)")
    if base_model is not None:
        model, tensors = open_model(base_model)
        config = model.config
    largest = max(layer.rank for layer in adapter.layers)
    if rank is None:
        rank = 2 * largest if dora else None
    if rank is not None and rank < 1:
        raise LorakitError(f"convert_adapter: rank must be a positive whole number, not {rank}")
    sides = max(side for layer in adapter.layers for side in (layer.a.shape[-1], layer.b.shape[0]))
    if rank is not None and rank > max(sides, largest):
        raise LorakitError(
            f"convert_adapter: rank {rank} is more than any layer has rows or columns; {sides} is "
            "the most that makes sense"
        )

    plain: dict[str, _Plain] = {}
    errors: dict[str, tuple[float, float]] = {}  # || delta - B' A' ||^2 and || delta ||^2
    bar = tqdm(
        adapter.layers, desc="converting", unit="layer", disable=None if dora else True, leave=False
    )
    for layer in bar:
        if layer.magnitude is not None:
            weight = _base_weight(adapter, layer, config, tensors, base_model)
            plain[layer.name], errors[layer.name] = _approximate(adapter, layer, weight, rank)
        elif layer.experts:
            plain |= _split_layer(adapter, layer, config)
        else:
            name = layer.name if config is None else _renamed_block(layer.name, config)
            a, b = (_finite(adapter, layer, tensor) for tensor in (layer.a, layer.b))
            plain[name] = _Plain(a, b, layer.scaling, layer.embedding)
    needed = max(len(part.a) for part in plain.values())
    if rank is not None and rank < needed:
        raise LorakitError(
            f"convert_adapter: rank={rank} cannot hold a layer of rank {needed}; leave it out"
        )
    rank = rank or needed
    written, alpha = _one_scaling(adapter, plain, rank)
    _write(target, written, _plain_config(adapter, sorted(plain, key=natural), rank, alpha))
    missed, whole = (math.fsum(squares[i] for squares in errors.values()) for i in (0, 1))
    return ConversionReport(
        str(target),
        len(plain),
        rank,
        alpha,
        _changes(adapter, rank),
        {name: _ratio(*squares) for name, squares in errors.items()},
        _ratio(missed, whole),
    )


def _check_target(source: Path, target: Path) -> None:
    if source.exists() and target.exists() and target.samefile(source):
        raise LorakitError(f"{target} is the adapter to be converted: name another directory")
    if target.exists() and not target.is_dir():
        raise LorakitError(f"{target} is a file: name a directory")
    if (target / CONFIG_FILE).exists() or (target / WEIGHTS_FILE).exists():
        raise LorakitError(
            f"{target} holds another adapter already: remove it first, or name a new directory"
        )
    if target.exists() and any(target.iterdir()):
        raise LorakitError(f"{target} is not empty: name a new directory")


def _check_plain(adapter: Adapter) -> None:
    """Raise LorakitError for what plain LoRA cannot hold."""
    path, values = adapter.path, adapter.values
    if adapter.unknown:
        raise LorakitError(f"{path}: tensor {adapter.unknown[0]} is of no kind known to lorakit")
    features.check_plain(path, values)
    if values.get("init_lora_weights") not in PLAIN_INITIALIZATIONS:
        raise LorakitError(
            f"{path}: init_lora_weights={json.dumps(values['init_lora_weights'])} changed the base "
            "weights, which these files do not hold: save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    for name in adapter.tokens + adapter.biases:
        raise LorakitError(f"{path}: {name} does not fit in plain LoRA: {features.MERGE}")
    if not adapter.layers:
        raise LorakitError(f"{path}: no layer is adapted")
    for layer in adapter.layers:
        if layer.bias is not None and layer.bias.read().any():
            raise LorakitError(
                f"{path}: {layer.key}.lora_B.bias (lora_bias) does not fit in plain LoRA unless it "
                f"is zero: {features.MERGE}"
            )
        if layer.rank != layer.expected_rank:
            raise LorakitError(
                f"{path}: {layer.key}.lora_A is of rank {layer.rank}, {CONFIG_FILE} gives "
                f"{layer.expected_rank}, which its scaling follows from"
            )
        dora = bool(adapter.config.use_dora)
        if dora and layer.magnitude is None and not layer.embedding and not layer.experts:
            raise LorakitError(f"{path}: tensor {layer.key}.lora_magnitude_vector is missing")
        if layer.magnitude is not None and (not dora or layer.embedding or layer.experts):
            why = "embeddings and fused experts" if dora else "use_dora=false"
            raise LorakitError(f"{path}: {layer.key}.lora_magnitude_vector does not go with {why}")


def _finite(adapter: Adapter, layer: Layer, tensor: LazyTensor) -> Tensor:
    """The values in fp32. Raises LorakitError if one is NaN or infinite."""
    values = tensor.read().float()
    if not torch.isfinite(values).all():
        raise LorakitError(f"{adapter.path}: {layer.key} holds NaN or infinite values")
    return values


def _renamed_block(name: str, config: ModelConfig) -> str:
    """A name from transformers 5, where every MoE block is `mlp`, as the checkpoint has it."""
    block = config.moe_names[0]
    if block != "mlp" and config.num_experts:
        return re.sub(r"(\.layers\.\d+)\.mlp\.", rf"\1.{block}.", name)
    return name


def _split_layer(adapter: Adapter, layer: Layer, config: ModelConfig) -> dict[str, _Plain]:
    a, b = (_finite(adapter, layer, tensor) for tensor in (layer.a, layer.b))
    parts = {f"{layer.key}.lora_A.weight": a, f"{layer.key}.lora_B.weight": b}
    kind = layer.name.rpartition(".")[2]
    if config.num_experts != layer.experts:
        raise LorakitError(
            f"{adapter.path}: {layer.key} is of {layer.experts} experts, the base model has "
            f"{config.num_experts}"
        )
    # alone, whatever lies around it: its kind is known
    outer = layer.key.removesuffix(".base_layer")
    parts = {name.replace(layer.key, outer): tensor for name, tensor in parts.items()}
    split = split_experts(parts, layer.experts, config.moe_names, [kind])
    return {
        key.removeprefix(PREFIX): _Plain(
            split[f"{key}.lora_A.weight"], split[f"{key}.lora_B.weight"], layer.scaling, False
        )
        for key in dict.fromkeys(name.rsplit(".", 2)[0] for name in split)
    }


def _base_weight(adapter, layer: Layer, config: ModelConfig, tensors, base_model) -> Tensor:
    """W of an adapted layer, [out, in] in fp32."""
    # a multimodal model's names: the text model is opened alone
    name = text_name(_renamed_block(layer.name, config)) + ".weight"
    if name == "lm_head.weight" and config.tie_word_embeddings:
        name = "model.embed_tokens.weight"
    if name not in tensors:
        raise LorakitError(
            f"{adapter.path}: layer {layer.name} is none of {base_model}{nearest(name, tensors)}"
        )
    shape = (layer.b.shape[0], layer.a.shape[1])
    if tensors[name].shape != shape or layer.magnitude.shape != shape[:1]:
        raise LorakitError(
            f"{adapter.path}: the adapter of {layer.name} is for a weight {shape} and has "
            f"{layer.magnitude.shape} magnitudes, {base_model} has {tensors[name].shape}"
        )
    stored = tensors[name].read()
    if tensors[name].packed is not None:
        return kernels.dequantize(stored, torch.float32)
    return stored.float()


def _approximate(
    adapter: Adapter, layer: Layer, weight: Tensor, rank: int
) -> tuple[_Plain, tuple[float, float]]:
    """The best A and B of `rank` for the update of a DoRA layer, with the squares of the error and
    of the update.
    """
    a, b, m = (_finite(adapter, layer, t) for t in (layer.a, layer.b, layer.magnitude))
    adapted = torch.addmm(weight, b, a, alpha=layer.scaling)
    norm = torch.linalg.vector_norm(adapted, dim=1, dtype=torch.float64)
    # a row of zeros stays one, whatever its magnitude
    g = torch.where(norm > 0, m.double() / norm, 1.0)
    delta = (g - 1).float()[:, None] * weight
    delta.addmm_((layer.scaling * g).float()[:, None] * b, a)
    if not torch.isfinite(delta).all():
        raise LorakitError(f"{adapter.path}: the update of {layer.name} is not finite")
    whole = delta.double().square().sum().item()
    kept = min(rank, *delta.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = min(2 * kept, *delta.shape)
        U, S, V = torch.svd_lowrank(delta, q=width, niter=SUBSPACE_ITERATIONS)
    root = S[:kept].sqrt()
    a, b = root[:, None] * V[:, :kept].t(), U[:, :kept] * root
    missed = delta.addmm_(b, a, alpha=-1).double().square().sum().item()
    return _Plain(a, b, 1.0, False), (missed, whole)


def _one_scaling(
    adapter: Adapter, plain: Mapping[str, _Plain], rank: int
) -> tuple[dict[str, Tensor], int]:
    """The tensors of the file, all of `rank`, and the one lora_alpha."""
    scalings = {part.scaling for part in plain.values()}
    shared = next(iter(scalings)) * rank
    whole = len(scalings) == 1 and shared >= 1 and float(shared).is_integer()
    tensors = {}
    for name, (a, b, scaling, embedding) in plain.items():
        if not whole:
            b = (b.double() * scaling).float()
            if not torch.isfinite(b).all():
                raise LorakitError(
                    f"{adapter.path}: {name}: B times {scaling:g} is too large for fp32"
                )
        ends = ("lora_embedding_A", "lora_embedding_B")
        for end, tensor, missing in zip(
            ends if embedding else ("lora_A.weight", "lora_B.weight"),
            (a, b),
            ((0, 0, 0, rank - len(a)), (0, rank - len(a))),
            strict=True,
        ):
            tensors[f"{PREFIX}{name}.{end}"] = F.pad(tensor, missing)
    return tensors, int(shared) if whole else rank


def _plain_config(adapter: Adapter, names: list[str], rank: int, alpha: int) -> dict[str, Any]:
    config = adapter.config
    return {
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": names,
        "task_type": config.task_type,
        "use_rslora": False,
    }


def _write(target: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Both files, under another name first: `target` holds a whole adapter or nothing."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        write_safetensors(temporary / WEIGHTS_FILE, tensors)
        write_json(temporary / CONFIG_FILE, config)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _ratio(missed: float, whole: float) -> float:
    return math.sqrt(missed / whole) if whole else 0.0


def _changes(adapter: Adapter, rank: int) -> list[str]:
    layers = adapter.layers
    ranks = sorted({layer.rank for layer in layers if layer.magnitude is None})
    scalings = {layer.scaling for layer in layers}
    changes = []
    if any(layer.magnitude is not None for layer in layers):
        changes.append(f"DoRA: the update of each layer approximated by rank {rank}")
    if ranks and ranks != [rank]:
        changes.append(f"ranks {', '.join(map(str, ranks))} made {rank} with zeros")
    if adapter.config.use_rslora:
        changes.append("rsLoRA: its scaling is now lora_alpha / r")
    if len(scalings) > 1:
        changes.append(f"{len(scalings)} different scalings folded into B")
    if any(layer.experts for layer in layers):
        changes.append("fused experts split into the layers of each")
    if any(layer.bias is not None for layer in layers):
        changes.append("lora_bias left out: it is zero")
    if adapter.copies:
        changes.append(f"copies of base weights left out: {some(adapter.copies)}")
    return changes
