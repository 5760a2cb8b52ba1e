"""Carried out of lorakit/checkpoint.py."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config.errors import LorakitError
from lorakit.files import hub
from lorakit.files.local import as_path, atomic, write_json
from lorakit.files.safetensors import INDEX_FILE, WEIGHTS_FILE, LazyTensor, write_safetensors
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.decoder import Decoder
from lorakit.models.multimodal import Surroundings
from lorakit.models.packed_layers import Int8Linear, NF4Linear, PackedLinear, PackedWeight
from lorakit.models.tokenizer_files import load_tokenizer

log = logging.getLogger("lorakit")
COPIED = ["generation_config.json", "*processor_config.json", *hub.TOKENIZER]
COPIED += ["additional_chat_templates/*.jinja"]


# ---- writing ------------------------------------------------------------------------------------


def save_model(
    module: Decoder,
    path: str | Path,
    *,
    packed: bool = False,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write `module` as a Hugging Face directory, made if missing.

    packed: False writes dense weights in the model's dtype, packed layers dequantized. True writes
        packed linear layers as they are, as bitsandbytes does, so that lorakit and transformers
        with bitsandbytes load the very same numbers; everything else dense. A checkpoint is in 4
        bits or in int8: beside 4-bit layers int8 ones are written dense, and embeddings always.

    Merged adapters are written as merged, in shards of at most `max_shard_size` bytes (or one
    tensor); memory holds one shard at a time. What lay beside the weights that the model was loaded
    from comes along: tokenizer, generation config, and the other towers of a multimodal checkpoint.

    Raises LorakitError, and writes nothing, while an adapter is attached and not merged, over the
    checkpoint whose towers are to come along, and with `packed` if no linear layer is packed or
    there are such towers.
    """
    config = module.config.to_hf() | {"torch_dtype": str(module.dtype).removeprefix("torch.")}
    outer = None if module.source is None else module.source.surroundings
    path = as_path(path)
    if not _is_merged(module):
        raise LorakitError(
            "save_model: an adapter is attached; merge it into the weights, or detach it, first"
        )
    if outer is not None and outer.tensors and path.resolve() == module.source.path.resolve():
        raise LorakitError(
            f"save_model: the other towers are read from {path} while it writes; choose another "
            "directory"
        )
    if outer is not None and any(tensor.packed for tensor in outer.tensors.values()):
        raise LorakitError("save_model: towers that are packed beside a dense text are not written")
    kept = None
    if packed:
        kept, quantization = _kept_packed(module, outer)
        config["quantization_config"] = quantization
    plan = list(_stored_tensors(module, kept))
    if outer is not None:
        plan = [(outer.file_name(name), *rest) for name, *rest in plan]
        for name, tensor in outer.tensors.items():
            plan.append((name, tensor, tensor.read().nbytes))
        tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
        config = outer.config | tied | {"text_config": config}
        config.pop("quantization_config", None)  # the text is dense now

    shards: list[list[tuple[str, LazyTensor]]] = [[]]
    used = total = 0
    for name, tensor, size in plan:
        total += size
        if shards[-1] and used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append((name, tensor))
        used += size

    path.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = WEIGHTS_FILE
        if len(shards) > 1:
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(path / file, {name: tensor.read() for name, tensor in shard})
        weight_map |= {name: file for name, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(path / INDEX_FILE, index)
    write_json(path / "config.json", config)
    # what an earlier, differently sharded save left here would be read first, or not at all
    for stale in {WEIGHTS_FILE, INDEX_FILE, *(f.name for f in path.glob("model-*.safetensors"))}:
        if stale not in {*weight_map.values()} and not (stale == INDEX_FILE and len(shards) > 1):
            (path / stale).unlink(missing_ok=True)
    if module.source is not None:
        _copy_beside(module, path)


def _copy_beside(module: Decoder, path: Path) -> None:
    """Tokenizer and generation config, from where the model was loaded."""
    source = module.source.path
    if not source.exists():
        log.warning("lorakit: %s is gone; no tokenizer was written to %s", source, path)
    elif source.is_dir():
        for pattern in COPIED:
            for file in filter(Path.is_file, source.glob(pattern)):
                target = path / file.relative_to(source)
                if file.resolve() != target.resolve():
                    target.parent.mkdir(exist_ok=True)
                    with atomic(target) as temporary:
                        shutil.copyfile(file, temporary)
    else:
        ends = {
            "bos_token_id": module.config.bos_token_id,
            "eos_token_id": module.config.eos_token_id,
        }
        write_json(
            path / "generation_config.json", {k: v for k, v in ends.items() if v is not None}
        )
        try:
            load_tokenizer(source).save(path)
        except LorakitError as error:
            log.warning("lorakit: no tokenizer was written to %s: %s", path, error)


def _is_merged(module: nn.Module) -> bool:
    """Whether every adapter that computes anything is in the weights."""
    found = [each for each in module.modules() if isinstance(each, AdaptedLayer)]
    return any(each.merged is not None for each in found) or not found


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by name; in the place of an adapted one what computes there, merged or not."""
    if isinstance(module, AdaptedLayer):
        module = module.current_module()
    yield name, module
    for leaf, child in module.named_children():
        yield from _layers(child, f"{name}.{leaf}" if name else leaf)


def _kept_packed(
    module: Decoder, outer: Surroundings | None
) -> tuple[type[PackedWeight], dict[str, Any]]:
    """The layers that a packed checkpoint keeps packed, and its quantization_config."""
    if outer is not None:
        raise LorakitError("save_model: a multimodal checkpoint is written with packed=False only")
    layers = dict(_layers(module))
    linear = [layer for layer in layers.values() if isinstance(layer, PackedLinear)]
    if not linear:
        raise LorakitError("save_model: packed=True, but no linear layer is packed")
    four_bit = any(isinstance(layer, NF4Linear) for layer in linear)
    kept = NF4Linear if four_bit else Int8Linear
    others = {name: layer for name, layer in layers.items() if not isinstance(layer, kept)}
    unpacked = [name for name, layer in others.items() if isinstance(layer, PackedWeight)]
    if unpacked:
        log.warning("lorakit: save_model: written dense: %s", ", ".join(unpacked))
    if any("experts." in name for name in layers.keys() - others.keys()):
        log.warning(
            "lorakit: save_model: packed experts load in lorakit and transformers 4; "
            "transformers 5 has none"
        )
    # what transformers is not to expect packed; it has a head even where that is the embedding
    kinds = (nn.Linear, PackedLinear)
    dense = {name for name, layer in others.items() if isinstance(layer, kinds)}
    if module.lm_head is None:
        dense.add("lm_head")
    first = next(layer.config for layer in linear if isinstance(layer, kept))
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "llm_int8_skip_modules": sorted(dense),
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
    if four_bit:
        quantization |= {
            "bnb_4bit_quant_type": first.quant_type,
            "bnb_4bit_use_double_quant": first.double_quant,
            "bnb_4bit_compute_dtype": str(module.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }
    return kept, quantization


def _stored_tensors(
    module: nn.Module, kept: type[PackedWeight] | None
) -> Iterator[tuple[str, LazyTensor, int]]:
    """Every tensor of the file under its name, computed when read, and its size in bytes; layers of
    type `kept` packed, others dense.
    """

    def entry(name: str, shape: torch.Size, dtype: torch.dtype, read: Callable[[], Tensor]):
        return name, LazyTensor(tuple(shape), read), math.prod(shape) * dtype.itemsize

    for layer_name, layer in _layers(module):
        prefix = f"{layer_name}." if layer_name else ""
        parameters = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, PackedWeight):
            parameters = {name: p for name, p in parameters.items() if name == "bias"}
            if kept is not None and isinstance(layer, kept):
                parameters |= layer.quantized.tensors("weight")
            else:
                yield entry(f"{prefix}weight", layer.shape, layer.dtype, layer.dequantize)
        for name, tensor in parameters.items():
            if tensor is not None:
                yield entry(prefix + name, tensor.shape, tensor.dtype, lambda t=tensor: t)
