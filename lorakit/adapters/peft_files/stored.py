"""Open the files of a PEFT adapter, and tell what they hold, layer by layer, without a model.

    adapter_config.json          r, lora_alpha, and the patterns that give some layers another rank
                                 or alpha. The keys of a pattern are regexes. The first one that
                                 matches a layer's name, or its end after a dot, decides
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight, and what else was trained

The scaling of a layer is s = alpha / r, with rsLoRA alpha / sqrt(r). Tensors stay on disk until
somebody reads them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.peft_files.experts import is_fused, which_fused
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PEFT_ALPHA, PEFT_RANK, PREFIX
from lorakit.adapters.peft_files.opened import open_files
from lorakit.adapters.targets import ends_with
from lorakit.config.errors import LorakitError, check
from lorakit.config.fields import from_mapping
from lorakit.config.patterns import of_pattern, valid_regex
from lorakit.files.safetensors import LazyTensor
from lorakit.models.config import ModelConfig

# The ending of a tensor's key, and which part of a layer the tensor is.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_B.bias": "bias",
}
_TOKENS, _COPY = ".token_adapter.trainable_tokens_delta", ".base_layer.weight"
# A number in JSON may have any number of digits; alpha is computed with in fp32.
_LARGEST_ALPHA = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class StoredConfig:
    """The fields of adapter_config.json that tell what the tensors mean, with PEFT's defaults."""

    peft_type: str
    r: int = PEFT_RANK
    lora_alpha: int | float = PEFT_ALPHA
    rank_pattern: dict | None = None
    alpha_pattern: dict | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    bias: str | None = "none"
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    lora_dropout: int | float = 0.0
    base_model_name_or_path: str | None = None
    task_type: str | None = "CAUSAL_LM"

    def __post_init__(self):
        if self.peft_type != "LORA":
            raise LorakitError(f"peft_type is {self.peft_type!r}; only 'LORA' is supported")
        ranks, alphas = self.rank_pattern or {}, self.alpha_pattern or {}
        named = [("r", self.r), *((f"rank_pattern of {p!r}", r) for p, r in ranks.items())]
        for name, rank in named:
            if type(rank) is not int or not 0 < rank < 1 << 31:
                raise LorakitError(f"{name} must be a positive whole number, not {rank!r}")
        named = [("lora_alpha", self.lora_alpha)]
        named += [(f"alpha_pattern of {p!r}", alpha) for p, alpha in alphas.items()]
        for name, alpha in named:
            if type(alpha) not in (int, float) or not abs(alpha) <= _LARGEST_ALPHA:
                raise LorakitError(f"{name} must be a number, not {alpha!r}")
        for pattern in [*ranks, *alphas]:
            check(valid_regex(pattern), f"the pattern {pattern!r} is no valid regex")

    def rank(self, name: str) -> int:
        """Return the rank of the layer or parameter `name`."""
        rank: int = of_pattern(self.rank_pattern or {}, name, self.r)
        return rank

    def alpha(self, name: str) -> int | float:
        """Return the alpha of the layer or parameter `name`."""
        alpha: int | float = of_pattern(self.alpha_pattern or {}, name, self.lora_alpha)
        return alpha

    def scaling(self, name: str) -> float:
        """Return the factor of B A in the layer or parameter `name`."""
        rank = self.rank(name)
        return self.alpha(name) / (math.sqrt(rank) if self.use_rslora else rank)


class StoredLayer(NamedTuple):
    """The tensors of one adapted weight, or of all fused experts of one block."""

    name: str  # of the layer, or of the parameter that holds fused experts
    key: str  # the part of a tensor's key in the file that precedes .lora_A
    rank: int
    expected_rank: int  # by the config; it equals rank unless the files do not belong together
    alpha: int | float
    scaling: float
    experts: int  # how many fused experts share the tensors; 0 for a layer that is not fused
    embedding: bool
    a: LazyTensor  # [r, in], fused [E r, in]
    b: LazyTensor  # [out, r], fused [out, r E]
    magnitude: LazyTensor | None  # [out]
    bias: LazyTensor | None  # [out]


class StoredAdapter(NamedTuple):
    """The files of one adapter, opened. The lists hold names of tensors."""

    path: Path
    values: Mapping[str, Any]  # adapter_config.json, whole
    config: StoredConfig
    tensors: Mapping[str, LazyTensor]  # all of them
    written_by: str  # as AdapterFiles has it
    layers: list[StoredLayer]
    saved: list[str]  # trained modules
    tokens: list[str]  # trained rows of embeddings
    biases: list[str]  # trained biases of the base
    copies: list[str]  # copies of base weights
    unknown: list[str]


def open_adapter(path: str | Path, base: ModelConfig | None = None) -> StoredAdapter:
    """Open a LoRA adapter on disk; the values of its tensors stay there.

    `base` is the config of its model, by which the rows of a llama.cpp adapter are put in order.

    Raises LorakitError if a file is missing or damaged, if peft_type is not LORA, or if a layer has
    only A or only B.
    """
    files = open_files(path, base=base)
    path, values, tensors = files.path, files.values, files.tensors
    config: StoredConfig = from_mapping(
        StoredConfig, values, str(path / CONFIG_FILE), ignore_unknown=True
    )
    parts: dict[str, dict[str, LazyTensor]] = {}
    embeddings: set[str] = set()
    others: dict[str, list[str]] = {
        kind: [] for kind in ("saved", "tokens", "biases", "copies", "unknown")
    }
    for name in sorted(tensors, key=natural):
        key, part = _split_name(name)
        if part is None:
            others[_kind(name, config)].append(name)
            continue
        parts.setdefault(key, {})[part] = tensors[name]
        if ".lora_embedding_" in name:
            embeddings.add(key)
    layers = [_layer(path, config, key, parts, key in embeddings) for key in parts]
    return StoredAdapter(path, values, config, tensors, files.written_by, layers, **others)


def read_finite(path: Path, layer: StoredLayer, tensor: LazyTensor) -> Tensor:
    """Return the values of a tensor of `layer` in fp32.

    Raises LorakitError, naming the adapter's `path`, if one of them is NaN or infinite.
    """
    values = tensor.read().float()
    if not torch.isfinite(values).all():
        raise LorakitError(f"{path}: {layer.key} holds NaN or infinite values")
    return values


def natural(name: str) -> list[int | str]:
    """Return a key to sort names by, in which layers.2 comes before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def some(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _split_name(name: str) -> tuple[str, str | None]:
    """Return the key of the layer that a tensor belongs to, and which part of it the tensor is.

    A tensor that is no part of a layer returns its own name and None.
    """
    if name.startswith(PREFIX):
        for suffix, part in _PARTS.items():
            if name.endswith(suffix):
                return name.removesuffix(suffix), part
    return name, None


def _kind(name: str, config: StoredConfig) -> str:
    """Return which list of a StoredAdapter a tensor belongs to that is no part of a layer."""
    inner = name.removeprefix(PREFIX)
    if inner == name:
        return "unknown"
    if name.endswith(_TOKENS):
        return "tokens"
    if any(f".{saved}." in f".{inner}" for saved in config.modules_to_save or []):
        return "saved"
    if name.endswith(_COPY):
        return "copies"
    if name.endswith(".bias") and config.bias not in (None, "none"):
        return "biases"
    return "unknown"


_Parts = Mapping[str, Mapping[str, LazyTensor]]  # the parts of each layer by its key


def _layer(
    path: Path, config: StoredConfig, key: str, parts: _Parts, embedding: bool
) -> StoredLayer:
    """Return the layer at `key`, described by the config and by the shapes of its tensors."""
    a, b = _pair(path, key, parts[key], embedding)
    rows, experts = a.shape[0], 0
    name = key.removeprefix(PREFIX)
    configured = name  # the patterns are matched against this one
    if is_fused(key):
        name = configured = _fused_name(path, config, key, parts)
        experts = _experts(path, config, name, key, rows)
    elif any(ends_with(f"{name}.weight", target) for target in config.target_parameters or []):
        configured = f"{name}.weight"
    return StoredLayer(
        name=name,
        key=key,
        rank=rows // (experts or 1),
        expected_rank=config.rank(configured),
        alpha=config.alpha(configured),
        scaling=config.scaling(configured),
        experts=experts,
        embedding=embedding,
        a=a,
        b=b,
        magnitude=parts[key].get("magnitude"),
        bias=parts[key].get("bias"),
    )


def _pair(
    path: Path, key: str, own: Mapping[str, LazyTensor], embedding: bool
) -> tuple[LazyTensor, LazyTensor]:
    """Return A and B of a layer. Raises LorakitError unless both are there and of one rank."""
    ends = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
    for part, end in zip("ab", ends, strict=True):
        if part not in own:
            raise LorakitError(f"{path}: tensor {key}.lora_{end} is missing")
        if len(own[part].shape) != 2:
            raise LorakitError(
                f"{path}: tensor {key}.lora_{end} is {own[part].shape}; adapters of linear layers "
                "have two dimensions"
            )
    a, b = own["a"], own["b"]
    if a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise LorakitError(f"{path}: {key}: lora_A is {a.shape} and lora_B {b.shape}: no one rank")
    return a, b


def _experts(path: Path, config: StoredConfig, name: str, key: str, rows: int) -> int:
    """Return how many fused experts share the rows of lora_A."""
    expected = config.rank(name)
    if rows % expected:
        raise LorakitError(
            f"{path}: {key}: {rows} rows of lora_A are no multiple of the rank {expected} that "
            f"{CONFIG_FILE} gives {name}"
        )
    return rows // expected


def _fused_name(path: Path, config: StoredConfig, key: str, parts: _Parts) -> str:
    """Return the parameter that `key` adapts: ….experts.gate_up_proj or ….experts.down_proj."""
    outer = key.removesuffix(".base_layer")
    shapes = {
        k: (parts[k]["a"].shape[-1], parts[k]["b"].shape[0])
        for k in (outer, outer + ".base_layer")
        if {"a", "b"} <= parts.get(k, {}).keys()
    }
    try:
        leaf = which_fused(shapes, config.target_parameters or [])[key]
    except LorakitError as error:
        raise LorakitError(f"{path}: {error}") from None
    return f"{outer.removeprefix(PREFIX)}.{leaf}"
