"""The files of a PEFT adapter: what they hold, layer by layer, without a model.

    adapter_config.json          r, lora_alpha, and rank_pattern and alpha_pattern with others for
                                 some layers: of their keys, regexes, the first decides that
                                 matches a layer's name or its end after a dot
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight and what else was trained

The scaling of a layer is s = alpha / r, with rsLoRA alpha / sqrt(r). Norms of s B A come from
products of the size of the rank, in fp64:

    || B A ||_F^2 = tr((B^T B)(A A^T))
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.peft_files.experts import is_fused, per_expert, which_fused
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lorakit.config.errors import LorakitError, check
from lorakit.config.fields import from_mapping
from lorakit.config.patterns import of_pattern, valid_regex
from lorakit.files.local import as_path, read_json
from lorakit.files.safetensors import LazyTensor, open_safetensors

PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_B.bias": "bias",
}
LARGEST = torch.finfo(torch.float32).max  # alpha; what JSON calls a number may have no end
TOKENS, COPY = ".token_adapter.trainable_tokens_delta", ".base_layer.weight"


@dataclass(frozen=True)
class PeftConfig:
    """The fields of adapter_config.json that this module reads, with PEFT's defaults."""

    peft_type: str
    r: int = 8
    lora_alpha: int | float = 8
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
            if type(alpha) not in (int, float) or not abs(alpha) <= LARGEST:
                raise LorakitError(f"{name} must be a number, not {alpha!r}")
        for pattern in [*ranks, *alphas]:
            check(valid_regex(pattern), f"the pattern {pattern!r} is no valid regex")

    def rank(self, name: str) -> int:
        """Of the layer or parameter `name`."""
        return of_pattern(self.rank_pattern or {}, name, self.r)

    def alpha(self, name: str) -> int | float:
        """Of the layer or parameter `name`."""
        return of_pattern(self.alpha_pattern or {}, name, self.lora_alpha)

    def scaling(self, name: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank(name)
        return self.alpha(name) / (math.sqrt(rank) if self.use_rslora else rank)


class Layer(NamedTuple):
    """One adapted weight; `experts` of them side by side where they are fused."""

    name: str  # of the layer; of fused experts, the parameter's
    key: str  # what stands before .lora_A in the file
    rank: int
    expected_rank: int  # by the config; the same unless the files do not belong together
    alpha: int | float
    scaling: float
    experts: int  # 0: not fused
    embedding: bool
    a: LazyTensor  # [r, in], fused [E r, in]
    b: LazyTensor  # [out, r], fused [out, r E]
    magnitude: LazyTensor | None  # [out]
    bias: LazyTensor | None  # [out]


class Adapter(NamedTuple):
    """The files of one adapter, opened. The lists are of tensor names."""

    path: Path
    values: dict[str, Any]  # adapter_config.json
    config: PeftConfig
    layers: list[Layer]
    saved: list[str]  # whole modules, trained
    tokens: list[str]  # rows of an embedding, trained
    biases: list[str]  # of the base, trained
    copies: list[str]  # of base weights
    unknown: list[str]


def open_adapter(path: str | Path) -> Adapter:
    """Open an adapter's directory; values stay on disk. Raises LorakitError for a file that is
    missing or damaged, a peft_type other than LORA, or half an adapter of a layer.
    """
    path = as_path(path)
    values = read_json(path / CONFIG_FILE)
    config = from_mapping(PeftConfig, values, str(path / CONFIG_FILE), ignore_unknown=True)
    if not (path / WEIGHTS_FILE).exists() and (path / "adapter_model.bin").exists():
        raise LorakitError(
            f"{path}: adapter_model.bin is pickled, which is not read: save the adapter with a "
            "recent PEFT, as safetensors"
        )
    parts: dict[str, dict[str, LazyTensor]] = {}
    embeddings: set[str] = set()
    found: dict[str, list[str]] = {
        k: [] for k in ("saved", "tokens", "biases", "copies", "unknown")
    }
    tensors = open_safetensors(path / WEIGHTS_FILE)
    for name in sorted(tensors, key=natural):
        key, part = _split_name(name)
        if part:
            parts.setdefault(key, {})[part] = tensors[name]
            embeddings |= {key} if ".lora_embedding_" in name else set()
        else:
            found[_kind(name, config)].append(name)
    layers = [_layer(path, config, key, parts, key in embeddings) for key in parts]
    return Adapter(path, values, config, layers, **found)


def natural(name: str) -> list:
    """A key to sort by in which layers.2 comes before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _split_name(name: str) -> tuple[str, str | None]:
    """The layer and part that a tensor belongs to, or the name and None."""
    if name.startswith(PREFIX):
        for suffix, part in PARTS.items():
            if name.endswith(suffix):
                return name.removesuffix(suffix), part
    return name, None


def _kind(name: str, config: PeftConfig) -> str:
    inner = name.removeprefix(PREFIX)
    if inner == name:
        return "unknown"
    if name.endswith(TOKENS):
        return "tokens"
    if any(f".{saved}." in f".{inner}" for saved in config.modules_to_save or []):
        return "saved"
    if name.endswith(COPY):
        return "copies"
    if name.endswith(".bias") and config.bias not in (None, "none"):
        return "biases"
    return "unknown"


def _layer(path: Path, config: PeftConfig, key: str, parts: Mapping, embedding: bool) -> Layer:
    own = parts[key]
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
    rows, columns = a.shape[0], b.shape[1]
    if rows != columns or rows == 0:
        raise LorakitError(f"{path}: {key}: lora_A is {a.shape} and lora_B {b.shape}: no one rank")
    name, experts = key.removeprefix(PREFIX), 0
    pattern_name = name
    if is_fused(key):
        pattern_name = name = _fused_name(path, config, key, parts)
        expected = config.rank(name)
        if rows % expected:
            raise LorakitError(
                f"{path}: {key}: {rows} rows of lora_A are no multiple of the rank {expected} that "
                f"{CONFIG_FILE} gives {name}"
            )
        experts = rows // expected
    elif _selects(config.target_parameters or [], f"{name}.weight"):
        pattern_name = f"{name}.weight"
    return Layer(
        name,
        key,
        rows // (experts or 1),
        config.rank(pattern_name),
        config.alpha(pattern_name),
        config.scaling(pattern_name),
        experts,
        embedding,
        a,
        b,
        own.get("magnitude"),
        own.get("bias"),
    )


def _selects(targets: Sequence[str], name: str) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def _fused_name(path: Path, config: PeftConfig, key: str, parts: Mapping) -> str:
    """The parameter that `key` adapts: ….experts.gate_up_proj or ….experts.down_proj."""
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


@dataclass(frozen=True)
class AdapterLayer:
    """What is stored for one layer, or for the fused experts of one."""

    name: str
    rank: int
    alpha: int | float
    scaling: float
    norm_a: float  # || A ||_F
    norm_b: float
    norm_delta: float  # || s B A ||_F, before DoRA's magnitudes; of experts, over all of them
    dtype: str
    bytes: int


@dataclass(frozen=True)
class AdapterReport:
    """Of an adapter on disk: its layers in order, and what is stored beside them."""

    path: str
    layers: list[AdapterLayer]
    modules_to_save: int
    trainable_tokens: int
    magnitudes: int
    embeddings: int
    biases: int
    copies: int
    warnings: list[str]

    @property
    def bytes(self) -> int:
        """Of A and B of all layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def norm_delta(self) -> float:
        """|| s B A ||_F over all layers."""
        return math.hypot(*(layer.norm_delta for layer in self.layers))

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        lines = [
            f"{'layer':{width}}  {'rank':>4}  {'alpha':>6}  {'scaling':>8}  {'|A|':>8}  "
            f"{'|B|':>8}  {'|s B A|':>8}  {'dtype':>8}  {'bytes':>10}"
        ]
        for layer in self.layers:
            norms = "  ".join(
                f"{norm:8.3g}" for norm in (layer.norm_a, layer.norm_b, layer.norm_delta)
            )
            lines.append(
                f"{layer.name:{width}}  {layer.rank:4}  {layer.alpha:6g}  {layer.scaling:8.4g}  "
                f"{norms}  {layer.dtype:>8}  {layer.bytes:10,}"
            )
        ranks = sorted({layer.rank for layer in self.layers})
        of = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        lines += ["", f"{len(self.layers)} layers, {of}, {self.bytes:,} bytes, "]
        lines[-1] += f"|s B A| of all {self.norm_delta:.4g}"
        for count, what in [
            (self.magnitudes, "with a magnitude (DoRA), which |s B A| leaves out"),
            (self.embeddings, "on embeddings"),
            (self.modules_to_save, "tensors of modules trained whole (modules_to_save)"),
            (self.trainable_tokens, "trained rows of embeddings (trainable_token_indices)"),
            (self.biases, "trained biases"),
            (self.copies, "copies of base weights"),
        ]:
            lines += [f"{count} {what}"] * (count > 0)
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def describe_adapter(path: str | Path) -> AdapterReport:
    """What the PEFT or lorakit adapter in directory `path` holds; `print` it for a table.

    Ranks are those of the tensors, alpha and scaling follow from adapter_config.json by PEFT's
    rules. NaN, untrained layers, ranks that contradict the config and tensors of no known kind are
    in `warnings`. Raises LorakitError for a missing or damaged file, a peft_type other than LORA,
    or a layer with A or B alone.
    """
    adapter = open_adapter(path)
    layers, untrained, broken, wrong = [], [], [], []
    for layer in adapter.layers:
        a, b = layer.a.read(), layer.b.read()
        layers.append(
            AdapterLayer(
                layer.name,
                layer.rank,
                layer.alpha,
                layer.scaling,
                a.double().norm().item(),
                b.double().norm().item(),
                abs(layer.scaling) * _product_norm(a, b, layer.experts),
                "/".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in (a, b))),
                a.nbytes + b.nbytes,
            )
        )
        rest = [tensor.read() for tensor in (layer.magnitude, layer.bias) if tensor is not None]
        if not all(torch.isfinite(tensor.float()).all() for tensor in (a, b, *rest)):
            broken.append(layer.name)
        elif not (a if layer.embedding else b).any():  # which of them PEFT starts from zero
            untrained.append(layer.name)
        if layer.rank != layer.expected_rank:
            wrong.append(layer.name)
    beside = [n for names in (adapter.saved, adapter.tokens, adapter.biases) for n in names]
    tensors = open_safetensors(adapter.path / WEIGHTS_FILE)
    broken += [name for name in beside if not torch.isfinite(tensors[name].read().float()).all()]
    warnings = [
        f"{text}: {some(names)}"
        for names, text in [
            (broken, "NaN or infinite values"),
            (untrained, "an adapter that is all zero and changes nothing"),
            (wrong, f"another rank than {CONFIG_FILE} gives"),
            (adapter.unknown, "tensors of no known kind"),
        ]
        if names
    ]
    if not layers:
        warnings.append("no layer is adapted")
    return AdapterReport(
        str(adapter.path),
        layers,
        len(adapter.saved),
        sum(math.prod(tensors[name].shape[:1]) for name in adapter.tokens),
        sum(layer.magnitude is not None for layer in adapter.layers),
        sum(layer.embedding for layer in adapter.layers),
        len(adapter.biases) + sum(layer.bias is not None for layer in adapter.layers),
        len(adapter.copies),
        warnings,
    )


def some(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _product_norm(a: Tensor, b: Tensor, experts: int = 0) -> float:
    """|| B A ||_F of A [r, in] and B [out, r], or of all experts' where fused. fp64."""
    a, b = per_expert(a.double(), b.double(), experts or 1)
    square = ((b.mT @ b) * (a @ a.mT)).sum().item()
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else square
