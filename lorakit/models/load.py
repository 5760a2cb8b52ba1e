"""Checkpoints: Hugging Face directories and GGUF files in, Hugging Face directories out.

Reading never holds the dense model. Names and shapes of all tensors are compared with the model,
which lies on the meta device, before the first value is read; then one tensor at a time is read,
packed to 4 bits if it belongs to a quantized layer, and put in its place:

    peak memory = the model as it will be + twice the largest dense tensor

A checkpoint that holds more than a text model (Gemma 3 with its vision tower) is read for the text
model; the other tensors stay on disk, and `save_model` copies them as they are, so that the result
is again such a checkpoint.

Writing is atomic per file: a temporary file beside the target, fsync, rename. A reader sees the old
file or the new one. Nothing here unpickles, and nothing writes to the network.
"""

import dataclasses
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import hub, kernels
from .attached import Attached, attached
from .config import LorakitError, QuantConfig, nearest, quant_config, to_dtype
from .families import MULTIMODAL
from .files import as_path, atomic, read_json, write_json
from .gguf import read_gguf
from .memory import HUGE_PAGE, in_large_pages
from .model import Decoder
from .model_config import ModelConfig
from .quantization import Int8Linear, NF4Linear, PackedLinear, PackedWeight, packed_layer
from .quantization import quantize as quantize_module
from .tensors import (
    INDEX_FILE,
    WEIGHTS_FILE,
    LazyTensor,
    fold_packed,
    open_directory,
    write_safetensors,
)
from .tokenizer import load_tokenizer

log = logging.getLogger("lorakit")


class Outer(NamedTuple):
    """What a multimodal checkpoint holds around its text model."""

    config: dict[str, Any]  # config.json, whose text_config is the text model's
    prefixes: dict[str, str]  # the text model's names -> the file's, by their beginning
    tensors: dict[str, LazyTensor]  # of the other towers


class Source(NamedTuple):
    """Where a model was loaded from."""

    path: Path  # a directory or a .gguf file
    outer: Outer | None


# where multimodal checkpoints keep the text model: transformers 4.49 and since, and 4.52 in memory
LAYOUTS = (
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model.", "lm_head.": "lm_head."},
)
COPIED = ["generation_config.json", "*processor_config.json", *hub.TOKENIZER]
COPIED += ["additional_chat_templates/*.jinja"]


# ---- reading ------------------------------------------------------------------------------------


def load_model(
    path_or_hub_id: str | Path,
    *,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | Mapping | QuantConfig | None = None,
    device: str | torch.device | None = None,
) -> Decoder:
    """Load a causal language model, in evaluation mode.

    path_or_hub_id: a Hugging Face directory, a .gguf file, or a Hub id ("organization/name").
    dtype: of everything that is not quantized, and of all products.
    quantize: "nf4" or a QuantConfig packs the linear layers (not the head) to 4 bits while loading,
        from the values on disk; None keeps them as they are. What bitsandbytes packed, in 4 bits or
        in int8, stays packed with its very codes; `quantize` is not applied then, and a line says
        so.
    device: where to put it; default: the GPU if torch has one, else the CPU.

    Raises LorakitError, in one sentence, for anything that is missing, damaged, of the wrong shape
    or left over.
    """
    dtype, quant = to_dtype(dtype), quant_config(quantize)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tensors = open_model(path_or_hub_id)
    model.to(dtype)
    where = str(model.source.path)
    packed = {name: tensor.packed for name, tensor in tensors.items() if tensor.packed is not None}
    for name, stored in packed.items():
        _make_shell(model, name, stored, where)
    if quant is not None and packed:
        kinds = " and ".join(sorted({stored.quant_type for stored in packed.values()}))
        log.warning("lorakit: %s is quantized already (%s); it stays as it is", where, kinds)
    elif quant is not None:
        quantize_module(model, quant)
    homes = _homes(model) if device.type == "cpu" else {}
    bar = tqdm(
        tensors.items(),
        desc=f"loading {model.source.path.name}",
        unit="tensor",
        disable=None,
        leave=False,
    )
    for name, tensor in bar:
        try:
            _place(model, name, tensor.read(), dtype, device, homes)
        except ValueError as error:
            raise LorakitError(f"{where}: tensor {name}: {error}") from None
    return model.eval()


def open_model(path_or_hub_id: str | Path) -> tuple[Decoder, dict[str, LazyTensor]]:
    """The model of a checkpoint, on the meta device, and its tensors by name, still on disk. Raises
    LorakitError as `load_model` does.
    """
    path = hub.resolve(path_or_hub_id, [*hub.WEIGHTS, *hub.TOKENIZER])
    outer = None
    if path.suffix == ".gguf":
        config, found = read_gguf(path)
        tensors = {name: LazyTensor(*entry) for name, entry in found.items()}
    else:
        values = read_json(path / "config.json")
        config = ModelConfig.from_hf(values, str(path / "config.json"))
        tensors = fold_packed(open_directory(path), str(path))
        if values["model_type"] in MULTIMODAL:
            tensors, outer = _text_model(tensors, values, str(path))
        config = _completed(config, path, tensors)
    model = _empty_model(config, tensors, str(path))
    model.source = Source(path.absolute(), outer)
    return model, _select(tensors, model, str(path))


def _text_model(
    tensors: dict[str, LazyTensor], config: dict[str, Any], where: str
) -> tuple[dict[str, LazyTensor], Outer]:
    """The tensors of the text model, under its own names, and the rest."""
    for prefixes in LAYOUTS:
        if any(name.startswith(prefixes["model."]) for name in tensors):
            break
    else:
        raise LorakitError(f"{where}: the checkpoint holds no text model")
    text, rest = {}, {}
    for name, tensor in tensors.items():
        for inner, beginning in prefixes.items():
            if name.startswith(beginning):
                text[inner + name.removeprefix(beginning)] = tensor
                break
        else:
            rest[name] = tensor
    return text, Outer(config, prefixes, rest)


def _completed(config: ModelConfig, path: Path, tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """`config` with the end tokens of generation_config.json, and tied only if the weights are."""
    if (path / "generation_config.json").exists():
        where = f"{path / 'generation_config.json'}: eos_token_id"
        more = read_json(path / "generation_config.json").get("eos_token_id")
        more = [] if more is None else more if isinstance(more, list) else [more]
        if not all(type(token) is int for token in more):
            raise LorakitError(f"{where} must be a number or a list of numbers, not {more!r}")
        ends = list(dict.fromkeys([*config.eos_token_ids, *more]))
        if ends != config.eos_token_ids:
            config = dataclasses.replace(config, eos_token_id=ends)
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    both = config.tie_word_embeddings and head is not None and embedding is not None
    if both and not _same(head, embedding):
        log.warning(
            "lorakit: %s: the config ties head and embedding, the weights differ; kept apart", path
        )
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _same(a: LazyTensor, b: LazyTensor) -> bool:
    dense = a.packed is None and b.packed is None
    return dense and a.shape == b.shape and torch.equal(a.read(), b.read())


def _empty_model(config: ModelConfig, tensors: Mapping[str, LazyTensor], where: str) -> Decoder:
    """The model on the meta device. A damaged config may ask for sizes that no file could fill."""
    last = f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"
    if last not in tensors:  # said before a million layers are built
        raise LorakitError(f"{where}: tensor {last} is missing")
    try:
        with torch.device("meta"):
            return Decoder(config)
    except RuntimeError as error:
        raise LorakitError(f"{where}: the config's sizes are impossible ({error})") from None


def _select(tensors: dict[str, LazyTensor], model: Decoder, where: str) -> dict[str, LazyTensor]:
    """The tensors of the model, in its order; raises unless exactly these are there."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, shape in expected.items():
        if name not in tensors:
            raise LorakitError(f"{where}: tensor {name} is missing{nearest(name, tensors)}")
        if tensors[name].shape != shape:
            raise LorakitError(
                f"{where}: tensor {name} is {tensors[name].shape}, the config asks for {shape}"
            )
    for name in tensors:
        # old checkpoints store the rotary frequencies; tied ones may repeat the embedding as head
        derived = name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
        if name not in expected and not derived:
            raise LorakitError(f"{where}: tensor {name} belongs to no part of the model")
    return {name: tensors[name] for name in expected}


def _homes(model: nn.Module) -> dict[str, Tensor]:
    """Where dense matrices and packed codes go in host memory: in large pages, those of a layer
    that are smaller than a page side by side. Among the temporaries of loading they would leave
    holes in the heap.
    """
    groups: dict[tuple[str, torch.dtype], dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        dense = parameter.dim() == 2 and parameter.dtype == model.dtype
        if dense or parameter.dtype in (torch.uint8, torch.int8):
            layer = re.match(r"model\.layers\.\d+\.", name)
            small = layer and parameter.nbytes < HUGE_PAGE
            key = layer.group() if small else name, parameter.dtype
            groups.setdefault(key, {})[name] = parameter
    homes = {}
    for (_, dtype), group in groups.items():
        places = in_large_pages([parameter.shape for parameter in group.values()], dtype)
        homes |= zip(group, places, strict=True)
    return homes


def _make_shell(model: nn.Module, tensor: str, stored: QuantConfig, where: str) -> None:
    """Put an empty packed layer in the place of the dense one that owns `tensor`."""
    name, _, kind = tensor.rpartition(".")
    layer = model.get_submodule(name)
    if kind != "weight" or type(layer) not in (nn.Linear, nn.Embedding):
        raise LorakitError(
            f"{where}: tensor {tensor} is stored packed, which only the weights of linear layers "
            "and embeddings can be"
        )
    model.set_submodule(name, packed_layer(layer, stored))


def _place(
    model: nn.Module,
    name: str,
    value: Tensor | kernels.Packed,
    dtype: torch.dtype,
    device: torch.device,
    homes: Mapping[str, Tensor],
) -> None:
    """Copies: what was read may be a view of the file."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    packs = isinstance(owner, PackedWeight) and leaf == "weight"
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise ValueError(f"holds {value.dtype}; only floating-point weights are read")
        if packs:
            owner.requantize(value.to(device))
        else:
            setattr(owner, leaf, nn.Parameter(_settled(value, homes.get(name), dtype, device)))
    else:
        owner.place(value)
    if packs:
        for part, parameter in owner.named_parameters(recurse=False):
            if part != "bias":
                home = homes.get(f"{owner_name}.{part}")
                parameter.data = _settled(parameter.data, home, parameter.dtype, device)


def _settled(
    value: Tensor, home: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return value.to(device, dtype, copy=True) if home is None else home.copy_(value)


def dense_weights(
    module: nn.Module, weights: Mapping[str, Tensor] | None, what: str
) -> dict[str, LazyTensor]:
    """The dense weights that a quantized model was made from, by layer, still on disk: `weights`
    if given, else from where the model was loaded. `what` names the caller in messages.
    """
    if weights is not None:
        return {n: LazyTensor(tuple(w.shape), lambda w=w: w) for n, w in weights.items()}
    if not isinstance(module, Decoder) or module.source is None:
        raise LorakitError(f"{what}: the model was not loaded from a file; give its dense weights")
    _, tensors = open_model(module.source.path)
    if any(tensor.packed for tensor in tensors.values()):
        raise LorakitError(
            f"{what}: {module.source.path} is quantized itself; give the weights it was made from"
        )
    return {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}


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
    outer = None if module.source is None else module.source.outer
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
        plan = [(_outer_name(name, outer.prefixes), *rest) for name, *rest in plan]
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


def _outer_name(name: str, prefixes: Mapping[str, str]) -> str:
    for inner, beginning in prefixes.items():
        if name.startswith(inner):
            return beginning + name.removeprefix(inner)
    return name


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
    found = attached(module).values()
    return any(each.merged is not None for each in found) or not found


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by name; in the place of an adapted one what computes there, merged or not."""
    if isinstance(module, Attached):
        module = module.current()
    yield name, module
    for leaf, child in module.named_children():
        yield from _layers(child, f"{name}.{leaf}" if name else leaf)


def _kept_packed(module: Decoder, outer: Outer | None) -> tuple[type[PackedWeight], dict[str, Any]]:
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
