"""What quantization would do to each layer of a checkpoint, without making the model.

Every weight that `quantize` would pack is read, packed, dequantized, compared in fp64 and
forgotten: memory holds one layer. Per layer

    relative error  || W - W' ||_F / || W ||_F
    cosine          <W, W'> / (|| W ||_F || W' ||_F)
    bits            all stored bytes, scales included, times 8 over the parameters
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.config.quantization import QuantConfig, quant_config
from lorakit.files.local import as_path, atomic
from lorakit.models.load import only_dense, open_model
from lorakit.models.packed_layers import PackedWeight
from lorakit.models.packed_layers import quantize as quantize_module

CHUNK = 1 << 22  # values compared at a time, in fp64


@dataclass(frozen=True)
class LayerReport:
    name: str
    shape: tuple[int, ...]
    bits_per_parameter: float
    relative_error: float
    cosine: float


@dataclass(frozen=True)
class QuantReport:
    """Of a whole checkpoint: its layers in the model's order, and the bits per parameter of all its
    tensors together, those that stay dense counted as 16 bits.
    """

    path: str
    config: QuantConfig
    layers: list[LayerReport]
    bits_per_parameter: float

    @property
    def relative_error(self) -> float:
        """The mean over the layers."""
        return sum(layer.relative_error for layer in self.layers) / len(self.layers)

    def worst(self, count: int) -> list[LayerReport]:
        """The layers with the largest relative error, worst first."""
        return sorted(self.layers, key=lambda layer: -layer.relative_error)[:count]

    def __str__(self) -> str:
        return self.table()

    def table(self, worst: int = 10) -> str:
        """All layers, one line each, the `worst` ones again, and the whole."""
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
        """Write a PNG: relative error by depth, a line for each kind of layer. Needs matplotlib
        (the extra `plots`).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise LorakitError("plots need matplotlib: pip install 'lorakit[plots]'") from None
        errors: dict[str, dict[int, list[float]]] = {}  # kind -> depth -> one, or one per expert
        for layer in self.layers:
            depth = re.search(r"\blayers\.(\d+)\.", layer.name)
            kind = errors.setdefault(layer.name.rpartition(".")[2], {})
            kind.setdefault(int(depth[1]) if depth else 0, []).append(layer.relative_error)
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
    path_or_hub_id: str | Path, quantize: str | Mapping | QuantConfig = "nf4"
) -> QuantReport:
    """Quantize the layers of a checkpoint one at a time, as `load_model` would, and compare.

    Raises LorakitError as `load_model` does, and for a checkpoint that is quantized already.
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
    squares = torch.zeros(4, dtype=torch.float64)  # of W, of W', of their difference; and <W, W'>
    for w, q in zip(original.flatten().split(CHUNK), dense.flatten().split(CHUNK), strict=True):
        w, q = w.double(), q.double()
        squares += torch.stack([w @ w, q @ q, (w - q) @ (w - q), w @ q])
    w, q, difference, product = squares.tolist()
    error = math.sqrt(difference / w) if w else 0.0
    cosine = product / math.sqrt(w * q) if w and q else 1.0
    return LayerReport(name, layer.shape, layer.quantized.bits_per_parameter, error, cosine)
