"""Read an adapter as plain LoRA: s, A and B of each layer, and nothing else that was trained.

convert.py writes it for servers, and export/ for other programs. What they have no place for is
refused here: biases, trained tokens, whole modules, and options that change what A and B mean.
"""

import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lorakit.adapters.peft_files import features
from lorakit.adapters.peft_files.approximate import BaseModel, published_name
from lorakit.adapters.peft_files.experts import split_experts
from lorakit.adapters.peft_files.layout import CONFIG_FILE, PREFIX
from lorakit.adapters.peft_files.stored import (
    StoredAdapter,
    StoredLayer,
    open_adapter,
    read_finite,
)
from lorakit.config.adapters import PLAIN_INITIALIZATIONS
from lorakit.config.errors import LorakitError, nearest
from lorakit.files.hub import fetch_adapter
from lorakit.models.config import ModelConfig
from lorakit.models.load import open_model
from lorakit.models.multimodal import text_name


class PlainLayer(NamedTuple):
    """The update s B A of a layer, in fp32."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scaling: float
    embedding: bool
    magnitude: Tensor | None = None  # [out], of DoRA


class PlainAdapter(NamedTuple):
    """The layers of an adapter by the names that its base model's files have for them."""

    stored: StoredAdapter
    base: BaseModel
    layers: dict[str, PlainLayer]


def read_plain(source: str | Path, base_model: str | Path | None) -> PlainAdapter:
    """Read a LoRA adapter of any kind, layer by layer, for a program that computes B (A x) itself.

    Args:
        source: A LoRA adapter of any kind that `load_adapter` reads.
        base_model: A model directory, .gguf file or Hub id; None takes what the adapter names.

    Returns:
        The layers. Fused experts are split into the layers of each.

    Raises:
        LorakitError: A and B do not hold all of the adapter (biases, modules_to_save, trained
            tokens, ...), a layer is none of the base model's, a tied model's embedding or head is
            adapted, a file is missing or damaged, or a value is NaN.
    """
    source = fetch_adapter(source)
    if base_model is None:
        named = None if source.suffix == ".gguf" else open_adapter(source).config
        base_model = None if named is None else named.base_model_name_or_path
        if base_model is None:
            raise LorakitError(f"{source} names no base model: give base_model")
    base = open_base(base_model)
    adapter = open_adapter(source, base.config)
    check_plain(adapter)
    layers: dict[str, PlainLayer] = {}
    for layer in adapter.layers:
        if layer.experts:
            layers |= split_layer(adapter, layer, base.config)
            continue
        name = text_name(published_name(layer.name, base.config))
        tensors = [t for t in (layer.a, layer.b, layer.magnitude) if t is not None]
        a, b, *m = (read_finite(adapter.path, layer, tensor) for tensor in tensors)
        layers[name] = PlainLayer(a, b, layer.scaling, layer.embedding, m[0] if m else None)
    for name, plain in layers.items():
        _check_of_base(adapter, base, name, plain)
    return PlainAdapter(adapter, base, layers)


def _check_of_base(adapter: StoredAdapter, base: BaseModel, name: str, layer: PlainLayer) -> None:
    """Raise LorakitError unless the base model has this layer, for itself alone."""
    weight, shape = f"{name}.weight", (layer.b.shape[0], layer.a.shape[1])
    tied = base.config.tie_word_embeddings
    if tied and name in ("lm_head", "model.embed_tokens"):
        raise LorakitError(
            f"{adapter.path}: {name} is adapted, and embedding and head of {base.path} are one "
            "weight, which other programs cannot change for one of them: merge the adapter "
            "(lorakit merge)"
        )
    if weight not in base.tensors:
        raise LorakitError(
            f"{adapter.path}: layer {name} is none of {base.path}{nearest(weight, base.tensors)}"
        )
    stored = base.tensors[weight].shape
    if (stored[::-1] if layer.embedding else stored) != shape:
        raise LorakitError(
            f"{adapter.path}: layer {name} is for a weight of {shape}, that of {base.path} is "
            f"{tuple(stored)}"
        )


def check_plain(adapter: StoredAdapter) -> None:
    """Raise LorakitError if plain LoRA cannot hold the adapter."""
    path, values = adapter.path, adapter.values
    if adapter.unknown:
        raise LorakitError(f"{path}: tensor {adapter.unknown[0]} is of no kind known to lorakit")
    features.check_plain(path, values)
    if values.get("init_lora_weights") not in PLAIN_INITIALIZATIONS:
        raise LorakitError(
            f"{path}: init_lora_weights={json.dumps(values['init_lora_weights'])} changed the base "
            "weights, which these files do not hold: save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if trained := adapter.tokens + adapter.biases:
        raise LorakitError(f"{path}: {trained[0]} does not fit in plain LoRA: {features.MERGE}")
    if not adapter.layers:
        raise LorakitError(f"{path}: no layer is adapted")
    for layer in adapter.layers:
        _check_layer(adapter, layer)


def _check_layer(adapter: StoredAdapter, layer: StoredLayer) -> None:
    """Raise LorakitError if plain LoRA cannot hold the layer, or it contradicts the config."""
    path = adapter.path
    if layer.bias is not None and layer.bias.read().any():
        raise LorakitError(
            f"{path}: {layer.key}.lora_B.bias (lora_bias) does not fit in plain LoRA unless it "
            f"is zero: {features.MERGE}"
        )
    if layer.rank != layer.expected_rank:
        raise LorakitError(
            f"{path}: {layer.key}.lora_A is of rank {layer.rank}, {CONFIG_FILE} gives "
            f"{layer.expected_rank}, which its scaling follows from"
        )
    dora = bool(adapter.config.use_dora)
    needs_magnitude = dora and not layer.embedding and not layer.experts
    if needs_magnitude and layer.magnitude is None:
        raise LorakitError(f"{path}: tensor {layer.key}.lora_magnitude_vector is missing")
    if layer.magnitude is not None and not needs_magnitude:
        why = "embeddings and fused experts" if dora else "use_dora=false"
        raise LorakitError(f"{path}: {layer.key}.lora_magnitude_vector does not go with {why}")


def is_dora(adapter: StoredAdapter) -> bool:
    """Return whether a layer of the adapter is of DoRA."""
    return any(layer.magnitude is not None for layer in adapter.layers)


def open_base(base_model: str | Path) -> BaseModel:
    """Open the base model."""
    model, tensors, source = open_model(base_model)
    around = {} if source.surroundings is None else source.surroundings.tensors
    towers = {name.rpartition(".")[0] for name in around}
    return BaseModel(base_model, model.config, tensors, towers)


def check_base(adapter: StoredAdapter, base: BaseModel | None) -> None:
    """Raise LorakitError if the adapter needs a base model and there is none."""
    if base is not None:
        return
    if is_dora(adapter):
        why = "DoRA scales the weights of the base"
    elif any(layer.experts for layer in adapter.layers):
        why = "the base's config names experts"
    elif adapter.written_by == "llama.cpp":
        why = "the base's heads order the rows of q and k in a GGUF file"
    else:
        return
    raise LorakitError(f"{adapter.path}: {why}: give base_model (--base-model)")


def split_layer(
    adapter: StoredAdapter, layer: StoredLayer, config: ModelConfig
) -> dict[str, PlainLayer]:
    """Return the layers of each expert, by their published names."""
    a, b = (read_finite(adapter.path, layer, tensor) for tensor in (layer.a, layer.b))
    if config.num_experts != layer.experts:
        raise LorakitError(
            f"{adapter.path}: {layer.key} is of {layer.experts} experts, the base model has "
            f"{config.num_experts}"
        )
    # The shapes of one parameter alone do not tell which it is; its name does.
    outer, kind = layer.key.removesuffix(".base_layer"), layer.name.rpartition(".")[2]
    pair = {f"{outer}.lora_A.weight": a, f"{outer}.lora_B.weight": b}
    interleaved = config.experts_interleaved
    split = split_experts(pair, layer.experts, config.moe_names, [kind], interleaved)
    return {
        key.removeprefix(PREFIX): PlainLayer(
            split[f"{key}.lora_A.weight"], split[f"{key}.lora_B.weight"], layer.scaling, False
        )
        for key in dict.fromkeys(name.rsplit(".", 2)[0] for name in split)
    }
