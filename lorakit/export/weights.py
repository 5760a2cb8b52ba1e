"""The dense weights of a model, one at a time, with an adapter in them where one is.

A model in files is opened and never loaded: each tensor is read when it is written. With an adapter
beside it the model's parameters are views of its mapped files. They take no memory of their own,
and only what the adapter holds does. Each adapted weight is merged in fp32 when its turn comes, and
forgotten then. So no merged model exists, in memory or on disk. Biases, and modules that were
trained whole, are fp32 from the start: a bf16 model would round what the adapter has of them.

A GGUF file, and weights that bitsandbytes packed, cannot be mapped as they are. With an adapter
such a model is loaded: a GGUF file in fp32.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.adapters.layers.embeddings import TiedHead
from lorakit.adapters.layers.whole_modules import SavedModule
from lorakit.adapters.layers.wrapper import Attached
from lorakit.adapters.manage import check_no_block
from lorakit.adapters.peft_files.layout import PREFIX
from lorakit.adapters.peft_files.load import load_adapter
from lorakit.adapters.peft_files.opened import open_files
from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor
from lorakit.models.bitsandbytes import LazyWeight, only_dense
from lorakit.models.classifier import NO_TOKENS
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.models.load import load_model, open_model
from lorakit.models.multimodal import text_name
from lorakit.models.packed_layers import PackedWeight
from lorakit.models.per_layer import host_tables


class DenseModel(NamedTuple):
    """A model whose weights are read one at a time."""

    config: ModelConfig
    """What it computes."""
    tensors: dict[str, LazyTensor]
    """The weights by their published names; without lm_head.weight the head is the embedding."""
    path: Path | None
    """The directory or .gguf file that it came from."""


def dense_model(model: Decoder | str | Path, adapter: str | Path | None) -> DenseModel:
    """Return the dense weights of a model.

    Args:
        model: A model in memory, whose selected or merged adapter counts, or what `load_model`
            takes.
        adapter: The directory or .gguf file of an adapter for a model in files, or None.

    Raises:
        LorakitError: The files are damaged or do not fit, `adapter` is given for a model in memory,
            or the model begins with a learned prompt or has a head for classes.
    """
    if isinstance(model, Decoder):
        if adapter is not None:
            raise LorakitError(
                "export: adapter is for a model in files; give this one with load_adapter"
            )
        _check_writes(model.config)
        path = None if model.source is None else model.source.path
        return DenseModel(model.config, dict(_tensors(model)), path)
    opened, weights, source = open_model(model)
    _check_writes(opened.config)
    if adapter is None:
        source.log_quantized()
        found = {name: LazyTensor(w.shape, partial(_read, w)) for name, w in weights.items()}
        return DenseModel(opened.config, found, source.path)
    if source.path.suffix == ".gguf" or only_dense(weights) is None:
        opened = load_model(source.path, dtype="float32", device="cpu")
    else:
        source.log_quantized()
        trained = {text_name(key.removeprefix(PREFIX)) for key in open_files(adapter).tensors}
        for name, weight in weights.items():
            owner, _, leaf = name.rpartition(".")
            value = _read(weight)
            if name in trained or value.dim() == 1:  # the adapter's own has the dtype of this one
                value = value.float()
            setattr(opened.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    load_adapter(opened, adapter)
    return DenseModel(opened.config, dict(_tensors(opened)), source.path)


def _check_writes(config: ModelConfig) -> None:
    """Raise LorakitError for a model with a head for classes, which these formats do not have."""
    if config.classifier is not None:
        raise LorakitError(f"export: {NO_TOKENS}; transformers loads its directory as it is")


def _read(weight: LazyWeight) -> Tensor:
    """Return the values of a weight on disk, dense."""
    value = weight.read()
    return value if isinstance(value, Tensor) else kernels.dequantize(value, torch.float32)


def _tensors(model: Decoder) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the weights of a model in memory by name, with the selected adapter in them."""
    check_no_block(model, "export")
    if model.beginning.length:
        raise LorakitError(
            "export: the adapter is a learned prompt, which no file of a model has a place for"
        )
    for name, module in modules_with_adapters(model):
        prefix = f"{name}." if name else ""
        layer = module.original if isinstance(module, Attached) else module
        for leaf, parameter in layer.named_parameters(recurse=False):
            if isinstance(layer, PackedWeight) and leaf not in ("weight", "bias"):
                continue  # the scales
            shape = tuple(parameter.shape)
            if isinstance(layer, PackedWeight) and leaf == "weight":
                shape = layer.shape
            yield prefix + leaf, LazyTensor(shape, partial(_value, name, module, leaf))
    for name, table in host_tables(model).items():
        yield name, LazyTensor(tuple(table.weight.shape), table.read)


def modules_with_adapters(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by name; one that an adapter adds to as its wrapper."""
    if isinstance(module, TiedHead):
        return
    if isinstance(module, Attached):
        if module.active is not None and not isinstance(module, SavedModule):
            yield name, module
            return
        module = module.current_module()
    yield name, module
    for leaf, child in module.named_children():
        yield from modules_with_adapters(child, f"{name}.{leaf}" if name else leaf)


@torch.no_grad()
def _value(name: str, module: nn.Module, leaf: str) -> Tensor:
    """Return the parameter `leaf` of a module, dense, with the active part in it if it has one."""
    if isinstance(module, Attached):
        merged = _merged(module)
        own, added = (each._parameters.get("bias") for each in (module.original, merged))
        if own is None and added is not None:
            raise LorakitError(
                f"export: {name} has no bias to add the adapter's lora_bias to, and no file of the "
                "model has a place for one"
            )
        module = merged
    if isinstance(module, PackedWeight) and leaf == "weight":
        return module.dequantize()
    value = module._parameters[leaf]
    assert value is not None
    return value.detach().cpu()


def _merged(layer: Attached) -> nn.Module:
    """Return the layer with the active part in its weight, which is fp32 if it is dense.

    The weight of the original is widened meanwhile, since a merged one is of its dtype.
    """
    plain = layer.original
    stored = plain._parameters.get("weight")
    if isinstance(plain, PackedWeight) or not isinstance(stored, nn.Parameter):
        return layer.make_merged(None)
    plain.weight = nn.Parameter(stored.float(), requires_grad=False)
    try:
        return layer.make_merged(None)
    finally:
        plain.weight = stored
