"""Convert a PEFT adapter to plain LoRA, which every server reads.

adapter_config.json can say much that most servers do not read. `convert_adapter` writes what all of
them read: one r, one integer lora_alpha, and the shortest names that select the layers. For each
layer the update of the weight stays s B A:

    rank_pattern         smaller ranks are filled with zero rows of A and columns of B: exact
    alpha_pattern,       B' = (s r' / lora_alpha') B: each value of B is rounded once to fp32. Where
      rsLoRA             all layers share an s and s r' is a whole number, nothing is rounded
    fused experts        each expert gets its slices of A and B, under its published names
    DoRA                 the update has no finite rank in general. The base is needed, and the
                         best approximation is written (approximate.py)

Memory holds the adapter and one layer.
"""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lorakit.adapters.peft_files.approximate import BaseModel, approximate_dora, published_name
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lorakit.adapters.peft_files.plain import (
    PlainLayer,
    check_base,
    check_plain,
    is_dora,
    open_base,
    split_layer,
)
from lorakit.adapters.peft_files.stored import (
    StoredAdapter,
    natural,
    open_adapter,
    read_finite,
    some,
)
from lorakit.adapters.targets import ends_with, short_names
from lorakit.config.errors import LorakitError
from lorakit.files.hub import fetch_adapter
from lorakit.files.local import as_path, errors_name, write_json
from lorakit.files.safetensors import write_safetensors
from lorakit.models.multimodal import text_name


@dataclass(frozen=True)
class ConversionReport:
    """The adapter that `convert_adapter` wrote, and how it differs from the one that it read.

    Attributes:
        target: The directory that was written.
        layers: How many layers are adapted.
        r: The rank of every layer.
        lora_alpha: The alpha of every layer.
        changes: What was folded, split, left out or approximated, a phrase for each.
        errors: || delta - B' A' ||_F / || delta ||_F of each layer of a DoRA adapter.
        relative_error: That error over all layers together; 0 for an exact conversion.
    """

    target: str
    layers: int
    r: int
    lora_alpha: int
    changes: list[str]
    errors: dict[str, float] = field(default_factory=dict)
    relative_error: float = 0.0

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


@dataclass
class _Errors:
    """The squares || delta - B' A' ||_F^2 and || delta ||_F^2 of each approximated layer."""

    missed: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)

    def by_layer(self) -> dict[str, float]:
        """Return the relative error of each layer."""
        return {name: _ratio(self.missed[name], self.whole[name]) for name in self.missed}

    def over_all(self) -> float:
        """Return the relative error over all layers together."""
        return _ratio(math.fsum(self.missed.values()), math.fsum(self.whole.values()))


def _ratio(missed: float, whole: float) -> float:
    return math.sqrt(missed / whole) if whole else 0.0


@torch.no_grad()
def convert_adapter(
    source: str | Path,
    target: str | Path,
    *,
    base_model: str | Path | None = None,
    rank: int | None = None,
) -> ConversionReport:
    """Write an adapter again as plain LoRA in fp32, which every server reads.

    The result has one r and one lora_alpha, and no patterns, rsLoRA or DoRA. target_modules are
    names such as q_proj where the base model, or the list in `source`, tells that they select the
    adapted layers alone, and otherwise whole names. All but DoRA is exact, up to one rounding of B
    to fp32. A lora_bias of zeros, a bias setting without biases in the file, and copies of base
    weights are left out.

    Args:
        source: A LoRA adapter of any kind that `load_adapter` reads, by its Hub id too.
        target: The directory to write, which must be new or empty.
        base_model: A model directory, .gguf file or Hub id. It is needed for DoRA, whose update
            depends on the weights (packed ones are dequantized), for fused experts, whose published
            names it knows, and for a .gguf file, whose rows its heads order.
        rank: The rank to write; a larger one than needed is filled with zeros. None means the
            largest rank of a layer, or twice that for DoRA, which is approximated.

    Returns:
        A report of what was written and changed, with the errors of DoRA layers.

    Raises:
        LorakitError: Plain LoRA cannot hold the adapter (biases, modules_to_save, trained
            tokens, an initialization that changed the base, ...), a file is missing or damaged, a
            value is NaN, the rank is too small, or the target is neither new nor empty. Nothing is
            written then.
    """
    source, target = fetch_adapter(source), as_path(target).resolve()  # not a link to it
    check_target(source, target)
    base = None if base_model is None else open_base(base_model)
    adapter = open_adapter(source, None if base is None else base.config)
    check_plain(adapter)
    check_base(adapter, base)
    wanted = _wanted_rank(adapter, rank)
    plain, errors = _convert_layers(adapter, base, wanted)
    needed = max(len(layer.a) for layer in plain.values())
    if wanted is not None and wanted < needed:
        raise LorakitError(
            f"convert_adapter: rank={wanted} cannot hold a layer of rank {needed}; leave it out"
        )
    r = wanted or needed
    tensors, alpha = _with_one_scaling(adapter, plain, r)
    names = _target_modules(adapter, sorted(plain, key=natural), base)
    write_adapter(target, tensors, _plain_config(adapter, names, r, alpha))
    return ConversionReport(
        target=str(target),
        layers=len(plain),
        r=r,
        lora_alpha=alpha,
        changes=_changes(adapter, r),
        errors=errors.by_layer(),
        relative_error=errors.over_all(),
    )


# ---- what is refused, and what is needed ----


def check_target(source: Path, target: Path) -> None:
    """Raise LorakitError unless `target` is new or an empty directory."""
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


def _wanted_rank(adapter: StoredAdapter, rank: int | None) -> int | None:
    """Return the rank to write, or None for the largest that a converted layer has."""
    largest = max(layer.rank for layer in adapter.layers)
    if rank is None:
        rank = 2 * largest if is_dora(adapter) else None
    if rank is not None and rank < 1:
        raise LorakitError(f"convert_adapter: rank must be a positive whole number, not {rank}")
    sides = max(side for layer in adapter.layers for side in (layer.a.shape[-1], layer.b.shape[0]))
    if rank is not None and rank > max(sides, largest):
        raise LorakitError(
            f"convert_adapter: rank {rank} is more than any layer has rows or columns; {sides} is "
            "the most that makes sense"
        )
    return rank


# ---- layer by layer ----


def _convert_layers(
    adapter: StoredAdapter, base: BaseModel | None, rank: int | None
) -> tuple[dict[str, PlainLayer], _Errors]:
    """Return the converted layers by name, and the errors of those that are approximated."""
    plain: dict[str, PlainLayer] = {}
    errors = _Errors()
    disable = None if is_dora(adapter) else True  # only DoRA takes long enough to watch
    for layer in tqdm(
        adapter.layers, desc="converting", unit="layer", disable=disable, leave=False
    ):
        if layer.magnitude is not None:
            assert base is not None  # `check_base` raises an error for DoRA
            assert rank is not None  # `_wanted_rank` always gives DoRA one
            found = approximate_dora(adapter.path, layer, base, rank)
            plain[layer.name] = PlainLayer(found.a, found.b, 1.0, False)
            errors.missed[layer.name], errors.whole[layer.name] = found.missed, found.whole
        elif layer.experts:
            assert base is not None  # `check_base` asks for one here too
            plain |= split_layer(adapter, layer, base.config)
        else:
            name = layer.name if base is None else published_name(layer.name, base.config)
            a, b = (read_finite(adapter.path, layer, tensor) for tensor in (layer.a, layer.b))
            plain[name] = PlainLayer(a, b, layer.scaling, layer.embedding)
    return plain, errors


# ---- what is written ----


def _with_one_scaling(
    adapter: StoredAdapter, plain: Mapping[str, PlainLayer], rank: int
) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of the file, all of `rank`, and the one lora_alpha."""
    scalings = {part.scaling for part in plain.values()}
    shared = next(iter(scalings)) * rank
    whole = len(scalings) == 1 and shared >= 1 and float(shared).is_integer()
    tensors = {}
    for name, (a, b, scaling, embedding, _) in plain.items():
        if not whole:
            b = (b.double() * scaling).float()
            if not torch.isfinite(b).all():
                raise LorakitError(
                    f"{adapter.path}: {name}: B times {scaling:g} is too large for fp32"
                )
        end_a, end_b = "lora_A.weight", "lora_B.weight"
        if embedding:
            end_a, end_b = "lora_embedding_A", "lora_embedding_B"
        missing = rank - len(a)
        tensors[f"{PREFIX}{name}.{end_a}"] = F.pad(a, (0, 0, 0, missing))  # rows
        tensors[f"{PREFIX}{name}.{end_b}"] = F.pad(b, (0, missing))  # columns
    return tensors, int(shared) if whole else rank


def _target_modules(adapter: StoredAdapter, layers: list[str], base: BaseModel | None) -> list[str]:
    """Return the shortest known target_modules that select these layers and no others."""
    if base is not None:
        owners = {name.rpartition(".")[0] for name in base.tensors}
        return short_names(layers, owners.difference(map(text_name, layers)) | base.towers)
    values = adapter.values
    given = values.get("target_modules")
    narrowed = values.get("exclude_modules") or values.get("layers_to_transform") is not None
    if not isinstance(given, list) or narrowed:
        return layers
    matched = [any(ends_with(layer, entry) for entry in given) for layer in layers]
    used = [any(ends_with(layer, entry) for layer in layers) for entry in given]
    return sorted(given) if all(matched + used) else layers


def _plain_config(
    adapter: StoredAdapter, names: list[str], rank: int, alpha: int
) -> dict[str, Any]:
    """Return the adapter_config.json of an adapter whose target_modules are `names`."""
    config = adapter.config
    tied = {"ensure_weight_tying": True} if adapter.values.get("ensure_weight_tying") else {}
    return tied | {
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


def write_adapter(
    target: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    weights_file: str = WEIGHTS_FILE,
) -> None:
    """Write both files into a directory of another name first, then give it the name `target`.

    So `target` holds a whole adapter or nothing.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with errors_name(target, temporary):
            temporary.mkdir(parents=True)
            write_safetensors(temporary / weights_file, tensors)
            write_json(temporary / CONFIG_FILE, config)
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _changes(adapter: StoredAdapter, rank: int) -> list[str]:
    """Return the differences to the adapter that was read, a phrase for each."""
    layers = adapter.layers
    ranks = sorted({layer.rank for layer in layers if layer.magnitude is None})
    scalings = {layer.scaling for layer in layers}
    changes = []
    if is_dora(adapter):
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
