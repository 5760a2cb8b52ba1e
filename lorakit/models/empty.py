"""A model without weights, which is filled as `load_model` fills one from files.

Nothing is read: the values have shapes alone. What a forecast of memory books while it fills such a
model is what loading takes.
"""

import functools
from collections.abc import Callable, Iterator

import torch

from lorakit.config.quantization import QuantConfig
from lorakit.models.classifier import decoder_of
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.models.load import Target, place
from lorakit.models.packed_layers import PackedWeight, quantize


def empty_model(config: ModelConfig, dtype: torch.dtype, quant: QuantConfig | None) -> Decoder:
    """Return a model on the meta device that waits for its weights, as `load_model` makes it."""
    with torch.device("meta"):
        model = decoder_of(config)
    model.to(dtype).requires_grad_(False)
    if quant is not None:
        quantize(model, quant)
    return model.eval()


def fill_empty(model: Decoder, device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the names of a model's tensors, and what puts one in its place as `load_model` does.

    Args:
        model: A model of `empty_model`.
        device: The device that its tensors are put on, which need not be there (pretend.py).
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    for name in [name for name, _ in model.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        layer = packed.get(owner)
        if layer is None or leaf == "bias":
            shape = tuple(model.get_parameter(name).shape)
        elif leaf == "weight":
            shape = layer.shape
        else:
            continue  # comes with the weight
        # one value in host memory stands for all
        value = torch.empty((), dtype=model.dtype, device="cpu").expand(shape)
        yield name, functools.partial(place, model, name, value, Target(device, {}))
