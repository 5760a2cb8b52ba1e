"""Adapters for mlx_lm, and adapters of mlx_lm for PEFT.

    adapter_config.json    num_layers, and lora_parameters with rank, scale and keys
    adapters.safetensors   <layer>.lora_a [in, r], <layer>.lora_b [r, out], of DoRA <layer>.m [out]

mlx_lm computes W x + scale (x a) b. It adapts the modules `keys` of the last `num_layers` layers,
all with one rank and one scale, and every one of them must be in the file. So ranks are made one
with zeros, different scalings go into b, and a layer in between that is not adapted gets zeros.
All of that is exact up to one rounding of b. The experts of a block are one module, `switch_mlp`,
or what mlx_lm calls it in gpt-oss and Gemma 4. What has a vision tower is `language_model.` there.

adapters/peft_files/mlx_files.py reads such files, and holds the names. Source: tuner/utils.py,
tuner/lora.py and tuner/dora.py of mlx-lm 0.32.2.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.adapters.peft_files.convert import check_target, write_adapter
from lorakit.adapters.peft_files.mlx_files import (
    MIXTRAL_KINDS,
    WEIGHTS_OF_MLX,
    expert_leaf,
)
from lorakit.adapters.peft_files.opened import open_files
from lorakit.adapters.peft_files.plain import PlainAdapter, PlainLayer, read_plain
from lorakit.adapters.peft_files.stored import open_adapter
from lorakit.config.errors import LorakitError
from lorakit.files.hub import fetch_adapter
from lorakit.files.local import as_path
from lorakit.models.config import ModelConfig

_KINDS = {theirs: kind for kind, theirs in MIXTRAL_KINDS.items()}
_IN_LAYER = re.compile(r"(model\.layers\.(\d+)\.)(.+)")
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class MlxAdapter:
    """An adapter of mlx_lm that was written."""

    path: Path
    """Its directory."""
    modules: int
    """How many modules are adapted."""
    filled: int
    """How many of them have zeros, since the adapter had none of them."""
    rank: int
    """The rank of every module."""
    scale: float
    """The factor of the update."""

    def __str__(self) -> str:
        zeros = f", {self.filled} of them zeros to fill holes" if self.filled else ""
        return f"{self.path}: {self.modules} modules{zeros}, rank {self.rank}, scale {self.scale:g}"


class _Module(NamedTuple):
    """The update of one module of mlx_lm's, in fp32; [E, ...] in front for experts."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r], with the scaling in it if the modules do not share one
    magnitude: Tensor | None  # [out]
    embedding: bool = False


@torch.no_grad()
def export_mlx(
    adapter: str | Path, directory: str | Path, *, base_model: str | Path | None = None
) -> MlxAdapter:
    """Write a LoRA or DoRA adapter as mlx_lm's, for Apple's GPUs.

    Args:
        adapter: A LoRA adapter of any kind that `load_adapter` reads, by its Hub id too.
        directory: The directory to write, which must be new or empty.
        base_model: A directory, .gguf file or Hub id of the model that it was trained on. None
            takes the one that the adapter names.

    Returns:
        What was written, which prints as a line.

    Raises:
        LorakitError: mlx_lm has no place for something of the adapter (biases, modules_to_save,
            trained tokens, the embedding of a tied model, DoRA of some layers only or of experts),
            it does not fit the model, a file cannot be read, or the directory is not empty.
            Nothing is written then.
    """
    source, directory = fetch_adapter(adapter), as_path(directory).resolve()
    check_target(source, directory)
    plain = read_plain(source, base_model)
    dora = _check_dora(plain)
    scalings = {layer.scaling for layer in plain.layers.values()}
    scale = scalings.pop() if len(scalings) == 1 else 1.0
    rank = max(len(layer.a) for layer in plain.layers.values())
    modules = _modules(plain, rank, fold=bool(scalings))
    first, keys = _selection(modules, plain.base.config.num_hidden_layers)
    holes = _holes(plain, modules, first, keys, rank)
    if holes and dora:
        raise LorakitError(
            f"{source}: {next(iter(holes))} is not adapted, and mlx_lm adapts the same modules in "
            "all layers from the first on, which DoRA cannot do by zeros: merge it (lorakit merge)"
        )
    stored = plain.stored
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {
            "dropout": stored.config.lora_dropout,
            "keys": [f"{_around(plain)}{key}" if key in modules else key for key in keys],
            "rank": rank,
            "scale": scale,
        },
        "model": stored.config.base_model_name_or_path,
        "num_layers": plain.base.config.num_hidden_layers - first,
    }
    tensors = _tensors(modules | holes, _around(plain))
    write_adapter(directory, tensors, config, WEIGHTS_OF_MLX)
    return MlxAdapter(directory, len(modules) + len(holes), len(holes), rank, scale)


def import_mlx(adapter: str | Path, directory: str | Path) -> Path:
    """Write an adapter of mlx_lm as PEFT's; no value changes.

    Args:
        adapter: The directory or the Hub id of the adapter.
        directory: The directory to write, which must be new or empty.

    Returns:
        The directory.

    Raises:
        LorakitError: The adapter is not mlx_lm's, its files are missing or damaged, or the
            directory is not empty. Nothing is written then.
    """
    source, directory = fetch_adapter(adapter), as_path(directory).resolve()
    check_target(source, directory)
    files = open_files(source)
    if files.written_by != "MLX":
        raise LorakitError(f"{source} is no adapter of mlx_lm, but one of {files.written_by}")
    open_adapter(source)  # A without B, or of another rank than the config's, raises an error
    alpha = files.values["lora_alpha"]
    whole = {"lora_alpha": int(alpha)} if float(alpha).is_integer() else {}
    tensors = {key: tensor.read() for key, tensor in files.tensors.items()}
    write_adapter(directory, tensors, {**files.values, **whole})
    return directory


def _check_dora(plain: PlainAdapter) -> bool:
    """Return whether the adapter is DoRA; refuse one that is so in part, or in experts."""
    with_it = {name for name, layer in plain.layers.items() if layer.magnitude is not None}
    if not with_it:
        return False
    others = [name for name in plain.layers if name not in with_it or _EXPERT.match(name)]
    if others:
        raise LorakitError(
            f"{plain.stored.path}: {others[0]} hinders: mlx_lm has DoRA in all modules or in none, "
            "and none for experts; merge the adapter (lorakit merge)"
        )
    return True


def _switch(config: ModelConfig) -> str:
    """Return what stands between the name of a block and that of its experts' gate, up or down."""
    if config.experts_interleaved:  # gpt-oss
        return ".experts."
    return ".experts.switch_glu." if config.moe_beside_mlp else ".switch_mlp."  # Gemma 4, or others


def _around(plain: PlainAdapter) -> str:
    """Return what mlx_lm puts before the names of a text model that has other towers beside it."""
    return "language_model." if plain.base.towers else ""


def _modules(plain: PlainAdapter, rank: int, *, fold: bool) -> dict[str, _Module]:
    """Return the adapted modules by mlx_lm's names."""
    found: dict[str, _Module] = {}
    for name, layer in plain.layers.items():
        a, b = _padded(layer, rank, fold)
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            found[name] = _Module(a, b, layer.magnitude, layer.embedding)
            continue
        block, number, leaf = expert.groups()
        place = f"{block}{_switch(plain.base.config)}{_KINDS.get(leaf, leaf)}"
        if place not in found:
            shape = plain.base.config.num_experts
            found[place] = _Module(a.new_zeros(shape, *a.shape), b.new_zeros(shape, *b.shape), None)
        found[place].a[int(number)] = a
        found[place].b[int(number)] = b
    return found


def _padded(layer: PlainLayer, rank: int, fold: bool) -> tuple[Tensor, Tensor]:
    """Return A and B of a layer with zeros up to the rank, with the scaling in B if asked for."""
    missing = rank - len(layer.a)
    b = (layer.b.double() * layer.scaling).float() if fold else layer.b
    return F.pad(layer.a, (0, 0, 0, missing)), F.pad(b, (0, missing))


def _selection(modules: dict[str, _Module], layers: int) -> tuple[int, list[str]]:
    """Return the first adapted layer, and the keys that select the modules."""
    places = [(name, _IN_LAYER.fullmatch(name)) for name in modules]
    numbers = [int(place[2]) for _, place in places if place is not None]
    keys = {name if place is None else place[3] for name, place in places}
    return min(numbers, default=layers - 1), sorted(keys)


def _holes(
    plain: PlainAdapter, modules: dict[str, _Module], first: int, keys: list[str], rank: int
) -> dict[str, _Module]:
    """Return zeros for the modules that mlx_lm selects and the adapter does not adapt."""
    config = plain.base.config
    found: dict[str, _Module] = {}
    for number in range(first, config.num_hidden_layers):
        for key in keys:
            name = f"model.layers.{number}.{key}"
            block, switch, kind = name.partition(_switch(config))
            expert = f"{block}.experts.0.{expert_leaf(block, kind)}"
            weight = f"{expert if switch else name}.weight"
            if name in modules or weight not in plain.base.tensors:
                continue
            rows, columns = plain.base.tensors[weight].shape
            front = (config.num_experts,) if switch else ()
            a, b = torch.zeros(*front, rank, columns), torch.zeros(*front, rows, rank)
            found[name] = _Module(a, b, None)
    return found


def _tensors(modules: dict[str, _Module], around: str) -> dict[str, Tensor]:
    """Return the tensors of the file by their names, which begin with `around`."""
    found: dict[str, Tensor] = {}
    for name, module in modules.items():
        a, b = module.a, module.b
        if a.dim() == 2:
            a, b = a.t(), b.t()
        found |= {f"{around}{name}.lora_a": a, f"{around}{name}.lora_b": b}
        if module.magnitude is not None:
            found[f"{around}{name}.m"] = module.magnitude
    return found
