"""Merge-aware training: which quantizer a layer's later merge has, and what it does to the logits.

    attach(model, LoraConfig(quantize_aware="nf4"))      every layer computes with Q(W + s B A)
    merge(model, "nf4")                                  the same weights, packed

layers/quantized_sum.py makes the weights. A quantization of GGUF files mixes formats: the format of
a layer is that which `export_gguf` gives its tensor, without importance and without types of the
caller's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from lorakit.adapters.layers.base import DenseBase, LinearBase
from lorakit.adapters.layers.lora import LoraPart
from lorakit.adapters.layers.quantized_sum import Quantizer, Stored, as_nf4
from lorakit.config.errors import LorakitError
from lorakit.config.quantization import QuantConfig
from lorakit.models.decoder import Decoder
from lorakit.models.gguf_mix import Mix
from lorakit.models.gguf_names import dialect_of, restoration, storage, stored_name
from lorakit.models.packed_layers import PackedWeight
from lorakit.models.shards import is_sharded


def merge_quantizer(kind: str, model: nn.Module, name: str, base: LinearBase) -> Quantizer:
    """Return what quantizes the sum of base and update as a later merge does.

    Args:
        kind: "nf4", or a quantization of GGUF files.
        model: The model that the layer is in.
        name: The name of the layer.
        base: The layer.

    Raises:
        LorakitError: The merge would leave the layer as it is, or store it in another way.
    """
    assert isinstance(base, nn.Module)
    layer: nn.Module = base
    if is_sharded(next(base.parameters())):
        raise LorakitError(f"quantize_aware {kind} needs whole weights, and these are sharded")
    packed = isinstance(base, PackedWeight)
    if name == "lm_head":
        raise LorakitError("the head is not merged in few bits: quantize_aware leaves it out")
    if not packed and type(layer) is not DenseBase:
        raise LorakitError(f"quantize_aware {kind} needs an nn.Linear, without hooks")
    if kind != "nf4":
        return _stored(kind, model, name, base)
    config = base.config if isinstance(base, PackedWeight) else QuantConfig()
    if config.quant_type != "nf4":
        raise LorakitError(
            f"quantize_aware nf4 merges into nf4, and the layer is {config.quant_type}: load the "
            "model with quantize nf4, or without"
        )
    return partial(as_nf4, config)


def _stored(kind: str, model: nn.Module, name: str, base: LinearBase) -> Stored:
    """Return what stores the weight of a layer of a `Decoder` as `export_gguf` does."""
    if not isinstance(model, Decoder):
        raise LorakitError(f"quantize_aware {kind} is for models that export_gguf writes")
    config, published = model.config, f"{name}.weight"
    if config.fused_qkvz and name.endswith(".in_proj_qkvz"):
        raise LorakitError(
            f"quantize_aware {kind}: a GGUF file holds the layer in two parts: leave it out"
        )
    arch, dialect = dialect_of(config)
    tied = config.tie_word_embeddings
    shape = (base.out_features, base.in_features)
    block_type = Mix(kind, config, arch).kind(stored_name(published, dialect)[0], shape, tied=tied)
    if block_type == "F32":
        raise LorakitError(f"quantize_aware {kind}: a GGUF file holds the layer in fp32")
    return Stored(
        block_type.lower(),
        storage(published, dialect, config),
        restoration(published, dialect, config),
        rounds=isinstance(base, PackedWeight),
    )


@contextmanager
def without_rounding(model: nn.Module) -> Iterator[None]:
    """Let layers add their update to the base inside the block, and quantize nothing."""
    parts = [m for m in model.modules() if isinstance(m, LoraPart) and m.rounding is not None]
    kept = [part.rounding for part in parts]
    try:
        for part in parts:
            part.rounding = None
        yield
    finally:
        for part, rounding in zip(parts, kept, strict=True):
            part.rounding = rounding
