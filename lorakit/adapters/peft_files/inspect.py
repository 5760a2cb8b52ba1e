"""Show what an adapter on disk holds, layer by layer.

Norms of s B A come from products of the size of the rank, in fp64, so that no [out, in] matrix is
made:

    || B A ||_F^2 = tr((B^T B)(A A^T))
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapters.peft_files.experts import per_expert
from lorakit.adapters.peft_files.layout import CONFIG_FILE
from lorakit.adapters.peft_files.stored import StoredAdapter, StoredLayer, open_adapter, some


@dataclass(frozen=True)
class AdapterLayer:
    """The stored tensors of one layer, or of the fused experts of one block, in numbers.

    Attributes:
        name: The layer, or the parameter that holds the fused experts.
        rank: The rank of the tensors.
        alpha: The lora_alpha of this layer.
        scaling: The factor s of B A.
        norm_a: || A ||_F.
        norm_b: || B ||_F.
        norm_delta: || s B A ||_F, without DoRA's magnitudes. Fused experts have one norm over all.
        dtype: The dtype of A and B, such as "float32"; where they differ, "float32/bfloat16".
        bytes: The size of A and B.
    """

    name: str
    rank: int
    alpha: int | float
    scaling: float
    norm_a: float
    norm_b: float
    norm_delta: float
    dtype: str
    bytes: int


@dataclass(frozen=True)
class AdapterReport:
    """The contents of an adapter on disk: its layers in order, and counts of the rest.

    Attributes:
        path: The directory of the adapter, or its .gguf file.
        written_by: The library whose files they are: PEFT, MLX or llama.cpp.
        layers: The adapted layers.
        modules_to_save: How many tensors belong to modules that were trained whole.
        trainable_tokens: How many rows of embeddings were trained.
        magnitudes: How many layers have a magnitude (DoRA).
        embeddings: How many of the layers are embeddings.
        biases: How many trained biases there are.
        copies: How many copies of base weights there are.
        warnings: One phrase for each thing that looks wrong.
    """

    path: str
    written_by: str
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
        """The size of A and B of all layers."""
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
        if self.written_by != "PEFT":
            lines[-1] += f", in files of {self.written_by}"
        for count, what in [
            (self.magnitudes, "with a magnitude (DoRA), which |s B A| leaves out"),
            (self.embeddings, "on embeddings"),
            (self.modules_to_save, "tensors of modules trained whole (modules_to_save)"),
            (self.trainable_tokens, "trained rows of embeddings (trainable_token_indices)"),
            (self.biases, "trained biases"),
            (self.copies, "copies of base weights"),
        ]:
            if count:
                lines.append(f"{count} {what}")
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def describe_adapter(path: str | Path) -> AdapterReport:
    """Report what an adapter on disk holds; `print` the report for a table.

    Ranks are those of the tensors. Alpha and scaling follow from adapter_config.json by PEFT's
    rules. NaN, untrained layers, ranks that contradict the config and tensors of no known kind are
    reported as warnings.

    Args:
        path: The directory of the adapter, or its .gguf file.

    Returns:
        The report.

    Raises:
        LorakitError: A file is missing or damaged, peft_type is not LORA, or a layer has only A or
            only B.
    """
    adapter = open_adapter(path)
    layers, untrained, broken = [], [], []
    for layer in adapter.layers:
        a, b = layer.a.read(), layer.b.read()
        layers.append(_described(layer, a, b))
        if not _is_finite(layer, a, b):
            broken.append(layer.name)
        elif not (a if layer.embedding else b).any():  # PEFT starts this one from zero
            untrained.append(layer.name)
    tensors = adapter.tensors
    for name in [*adapter.saved, *adapter.tokens, *adapter.biases]:
        if not torch.isfinite(tensors[name].read().float()).all():
            broken.append(name)
    return AdapterReport(
        path=str(adapter.path),
        written_by=adapter.written_by,
        layers=layers,
        modules_to_save=len(adapter.saved),
        trainable_tokens=sum(math.prod(tensors[name].shape[:1]) for name in adapter.tokens),
        magnitudes=sum(layer.magnitude is not None for layer in adapter.layers),
        embeddings=sum(layer.embedding for layer in adapter.layers),
        biases=len(adapter.biases) + sum(layer.bias is not None for layer in adapter.layers),
        copies=len(adapter.copies),
        warnings=_warnings(adapter, broken, untrained),
    )


def _described(layer: StoredLayer, a: Tensor, b: Tensor) -> AdapterLayer:
    dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in (a, b))
    return AdapterLayer(
        name=layer.name,
        rank=layer.rank,
        alpha=layer.alpha,
        scaling=layer.scaling,
        norm_a=a.double().norm().item(),
        norm_b=b.double().norm().item(),
        norm_delta=abs(layer.scaling) * _product_norm(a, b, layer.experts),
        dtype="/".join(dtypes),
        bytes=a.nbytes + b.nbytes,
    )


def _is_finite(layer: StoredLayer, a: Tensor, b: Tensor) -> bool:
    """Return whether no value of the layer, whose A and B have been read, is NaN or infinite."""
    rest = [tensor.read() for tensor in (layer.magnitude, layer.bias) if tensor is not None]
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in (a, b, *rest))


def _warnings(adapter: StoredAdapter, broken: list[str], untrained: list[str]) -> list[str]:
    wrong = [layer.name for layer in adapter.layers if layer.rank != layer.expected_rank]
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
    if not adapter.layers:
        warnings.append("no layer is adapted")
    return warnings


def _product_norm(a: Tensor, b: Tensor, experts: int = 0) -> float:
    """Return || B A ||_F of A [r, in] and B [out, r], over all experts where they are fused."""
    a, b = per_expert(a.double(), b.double(), experts or 1)
    square: float = ((b.mT @ b) * (a @ a.mT)).sum().item()
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else square
