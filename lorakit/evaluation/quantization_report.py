"""What quantization would do to each layer of a model, without making the model.

Every weight that `quantize` would pack is read, packed, dequantized, compared in fp64 and
forgotten, so that memory holds one layer at a time. The report says of each layer W -> W'

    relative error  || W - W' ||_F / || W ||_F
    cosine          <W, W'> / (|| W ||_F || W' ||_F)
    bits            all stored bytes, scales included, times 8 over the parameters
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.config.quantization import QuantConfig, quant_config
from lorakit.files.local import as_path, atomic
from lorakit.models.bitsandbytes import only_dense
from lorakit.models.load import open_model
from lorakit.models.packed_layers import PackedWeight
from lorakit.models.packed_layers import quantize as quantize_module

CHUNK = 1 << 22  # values compared at a time, in fp64


@dataclass(frozen=True)
class LayerReport:
    """What quantization does to one layer."""

    name: str
    """The layer's name in the model."""
    shape: tuple[int, ...]
    """The shape of its weight W."""
    bits_per_parameter: float
    """All stored bits, scales included, over the number of parameters."""
    relative_error: float
    """|| W - W' ||_F / || W ||_F."""
    cosine: float
    """<W, W'> / (|| W ||_F || W' ||_F)."""


@dataclass(frozen=True)
class QuantReport:
    """What quantization does to a model. As text it is a table of its layers."""

    path: str
    """The directory or the file of the model."""
    config: QuantConfig
    """How the weights are quantized."""
    layers: list[LayerReport]
    """The quantized layers, in the model's order."""
    bits_per_parameter: float
    """Bits per parameter of all tensors together; those that stay dense count as 16 bits."""

    @property
    def relative_error(self) -> float:
        """The mean relative error of the layers."""
        return sum(layer.relative_error for layer in self.layers) / len(self.layers)

    def worst(self, count: int) -> list[LayerReport]:
        """Return the `count` layers with the largest relative error, the worst first."""
        return sorted(self.layers, key=lambda layer: -layer.relative_error)[:count]

    def __str__(self) -> str:
        return self.table()

    def table(self, worst: int = 10) -> str:
        """Return a line for each layer, the `worst` layers once more, and a line of the whole."""
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        head = f"{'layer':{width}}  {'shape':>15}  {'bits':>6}  {'error':>8}  {'cosine':>8}"

        def line(layer: LayerReport) -> str:
            shape = "x".join(map(str, layer.shape))
            return (
                f"{layer.name:{width}}  {shape:>15}  {layer.bits_per_parameter:6.3f}  "
                f"{layer.relative_error:8.5f}  {layer.cosine:8.6f}"
            )

        worst_ones = self.worst(worst)
        lines = [head, *map(line, self.layers), "", f"the {len(worst_ones)} worst"]
        lines += [*map(line, worst_ones), ""]
        lines.append(
            f"{len(self.layers)} layers, mean relative error {self.relative_error:.5f}; the whole "
            f"model {self.bits_per_parameter:.3f} bits per parameter"
        )
        return "\n".join(lines)

    def save_plot(self, path: str | Path) -> None:
        """Write a PNG of relative error by depth, with a line for each kind of layer.

        Args:
            path: The file to write. Its directory is made if it is missing.

        Raises:
            LorakitError: matplotlib (the extra `plots`) is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise LorakitError("plots need matplotlib: pip install 'lorakit[plots]'") from None
        # kind of layer -> depth -> its error, or the errors of a mixture's experts
        errors: dict[str, dict[int, list[float]]] = {}
        for layer in self.layers:
            depth = re.search(r"\blayers\.(\d+)\.", layer.name)
            of_kind = errors.setdefault(layer.name.rpartition(".")[2], {})
            of_kind.setdefault(int(depth[1]) if depth else 0, []).append(layer.relative_error)
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        for kind, by_depth in errors.items():
            means = [sum(found) / len(found) for found in by_depth.values()]
            axes.plot(list(by_depth), means, marker=".", linewidth=1, label=kind)
        axes.set(xlabel="layer", ylabel="relative error")
        axes.set_title(f"{Path(self.path).name} in {self.config.quant_type}")
        axes.grid(alpha=0.3)
        axes.legend(ncols=4, fontsize="small")
        path = as_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def quantize_report(
    path_or_hub_id: str | Path, quantize: str | Mapping[str, Any] | QuantConfig = "nf4"
) -> QuantReport:
    """Quantize the layers of a model one at a time, as `load_model` would, and compare.

    Args:
        path_or_hub_id: A directory or GGUF file with a model's weights, or its name on the Hugging
            Face hub, as `load_model` takes it.
        quantize: "nf4" or "int8", or a QuantConfig or its fields by name.

    Returns:
        A report of the error and the size of each layer.

    Raises:
        LorakitError: The model cannot be loaded, is quantized already, or holds a weight that is
            not finite; or `quantize` names no quantization.
    """
    config = quant_config(quantize)
    if config is None:
        raise LorakitError("quantize_report: say how to quantize, such as 'nf4'")
    model, weights, source = open_model(path_or_hub_id)
    path, tensors = source.path, only_dense(weights)
    if tensors is None:
        raise LorakitError(f"{path} is quantized already: report on what it was made from")
    quantize_module(model, config)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}
    layers, stored = [], 0
    for name, layer in tqdm(
        packed.items(), desc="quantizing", unit="layer", disable=None, leave=False
    ):
        original = tensors.pop(f"{name}.weight").read()
        try:
            layer.requantize(original)
        except ValueError as error:
            raise LorakitError(f"{path}: tensor {name}.weight: {error}") from None
        layers.append(_compare(name, layer, original))
        stored += layer.quantized.nbytes
        layer.to_empty(device="meta")
    parameters = sum(math.prod(layer.shape) for layer in layers)
    dense = sum(math.prod(tensor.shape) for tensor in tensors.values())
    bits = (8 * stored + 16 * dense) / (parameters + dense)
    return QuantReport(str(path), config, layers, bits)


def _compare(name: str, layer: PackedWeight, original: Tensor) -> LayerReport:
    dense = kernels.dequantize(layer.quantized, torch.float32)
    squares = torch.zeros(4, dtype=torch.float64)  # |W|^2, |W'|^2, |W - W'|^2, <W, W'>
    values, others = original.flatten(), dense.flatten()
    for start in range(0, len(values), CHUNK):
        w, q = (each[start : start + CHUNK].double() for each in (values, others))
        squares += torch.stack([w @ w, q @ q, (w - q) @ (w - q), w @ q])
    before, after, difference, product = squares.tolist()
    error = math.sqrt(difference / before) if before else 0.0
    cosine = product / math.sqrt(before * after) if before and after else 1.0
    return LayerReport(name, layer.shape, layer.quantized.bits_per_parameter, error, cosine)
