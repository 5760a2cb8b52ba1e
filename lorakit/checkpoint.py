"""Checkpoints: Hugging Face directories and GGUF files in, Hugging Face directories out.

Reading never holds the dense model. Names and shapes of all tensors are compared with the model,
which lies on the meta device, before the first value is read; then one tensor at a time is read,
packed to 4 bits if it belongs to a quantized layer, and put in its place:

    peak memory = the model as it will be + the largest dense tensor

A checkpoint that holds more than a text model (Gemma 3 with its vision tower) is read for the text
model; the other tensors stay on disk, and `save_model` copies them as they are, so that the result
is again such a checkpoint.

Writing is atomic per file: a temporary file beside the target, fsync, rename. A reader sees the old
file or the new one. Nothing here unpickles, and nothing writes to the network.
"""

import dataclasses
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from . import hub
from .config import LorakitError, QuantConfig, nearest, quant_config, to_dtype
from .families import MULTIMODAL
from .files import atomic, read_json, write_json
from .gguf import read_gguf
from .lora import LoraLinear
from .memory import HUGE_PAGE, in_large_pages
from .model import Decoder
from .model_config import ModelConfig
from .quantization import NF4Linear
from .quantization import quantize as quantize_module
from .tokenizer import load_tokenizer

log = logging.getLogger("lorakit")

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class LazyTensor(NamedTuple):
    """A tensor that is still on disk."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


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
        from the values on disk; None keeps them dense.
    device: where to put it; default: the GPU if torch has one, else the CPU.

    Raises LorakitError, in one sentence, for anything that is missing, damaged, of the wrong shape
    or left over.
    """
    dtype, quant = to_dtype(dtype), quant_config(quantize)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = hub.resolve(path_or_hub_id, [*hub.WEIGHTS, *hub.TOKENIZER])
    outer = None
    if path.suffix == ".gguf":
        config, found = read_gguf(path)
        tensors = {name: LazyTensor(*entry) for name, entry in found.items()}
    else:
        values = read_json(path / "config.json")
        config = ModelConfig.from_hf(values, str(path / "config.json"))
        tensors = _open_directory(path)
        if values["model_type"] in MULTIMODAL:
            tensors, outer = _text_model(tensors, values, str(path))
        config = _completed(config, path, tensors)

    model = _empty_model(config, tensors, str(path)).to(dtype)
    model.source = Source(path.absolute(), outer)
    tensors = _select(tensors, model, str(path))
    if quant is not None:
        quantize_module(model, quant)
    homes = _homes(model) if device.type == "cpu" else {}
    bar = tqdm(
        tensors.items(), desc=f"loading {path.name}", unit="tensor", disable=None, leave=False
    )
    for name, tensor in bar:
        try:
            _place(model, name, tensor.read().to(device), dtype, homes.get(name))
        except ValueError as error:
            raise LorakitError(f"{path}: tensor {name}: {error}") from None
    return model.eval()


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
    if both and not (head.shape == embedding.shape and torch.equal(head.read(), embedding.read())):
        log.warning(
            "lorakit: %s: the config ties head and embedding, the weights differ; kept apart", path
        )
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return config


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


def _open_directory(path: Path) -> dict[str, LazyTensor]:
    if (path / WEIGHTS_FILE).exists():
        return open_safetensors(path / WEIGHTS_FILE)
    if not (path / INDEX_FILE).exists():
        raise LorakitError(
            f"{path}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there "
            "(pickled weights are not read)"
        )
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise LorakitError(f"{path / INDEX_FILE}: weight_map, of names to files, is missing")
    shards = {file: open_safetensors(path / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise LorakitError(
                f"{path / file}: tensor {name}, which {INDEX_FILE} puts here, is missing"
            )
    return {name: shards[file][name] for name, file in weight_map.items()}


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file. Raises LorakitError if it is missing or damaged."""
    try:
        file = safe_open(path, framework="pt")
        names = list(file.keys())
        shapes = [tuple(file.get_slice(name).get_shape()) for name in names]
    except FileNotFoundError:
        raise LorakitError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise LorakitError(f"{path}: damaged or cut off ({error})") from None
    # the lambda keeps the file open as long as one of its tensors may be read
    return {
        name: LazyTensor(shape, lambda name=name: file.get_tensor(name))
        for name, shape in zip(names, shapes, strict=True)
    }


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
    """Where the dense matrices go in host memory: in large pages, those of a layer that are smaller
    than a page side by side.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.dtype == model.dtype:
            layer = re.match(r"model\.layers\.\d+\.", name)
            small = layer and parameter.nbytes < HUGE_PAGE
            groups.setdefault(layer.group() if small else name, {})[name] = parameter
    homes = {}
    for group in groups.values():
        places = in_large_pages([parameter.shape for parameter in group.values()], model.dtype)
        homes |= zip(group, places, strict=True)
    return homes


def _place(
    model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, home: Tensor | None
) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"holds {tensor.dtype}; only floating-point weights are read")
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, NF4Linear) and leaf == "weight":
        owner.requantize(tensor)
    else:  # a copy: the tensor may be a view of the file
        copy = tensor.to(dtype, copy=True) if home is None else home.copy_(tensor)
        setattr(owner, leaf, nn.Parameter(copy))


# ---- writing ------------------------------------------------------------------------------------


def save_model(module: Decoder, path: str | Path, *, max_shard_size: int = 5 * 10**9) -> None:
    """Write `module` as a Hugging Face directory of dense weights in its dtype, made if missing.

    Merged adapters are written as merged, 4-bit layers dequantized, in shards of at most
    `max_shard_size` bytes (or one tensor); memory holds one shard at a time. What lay beside the
    weights that the model was loaded from comes along: tokenizer, generation config, and the other
    towers of a multimodal checkpoint. Raises LorakitError, and writes nothing, while an adapter is
    attached and not merged.
    """
    plan = [
        (name, tensor, module.dtype.itemsize * torch.Size(tensor.shape).numel())
        for name, tensor in _dense_tensors(module)
    ]
    config = module.config.to_hf() | {"torch_dtype": str(module.dtype).removeprefix("torch.")}
    outer = None if module.source is None else module.source.outer
    if outer is not None:
        plan = [(_outer_name(name, outer.prefixes), *rest) for name, *rest in plan]
        for name, tensor in outer.tensors.items():
            plan.append((name, tensor, tensor.read().nbytes))
        tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
        config = outer.config | tied | {"text_config": config}

    shards: list[list[tuple[str, LazyTensor]]] = [[]]
    used = total = 0
    for name, tensor, size in plan:
        total += size
        if shards[-1] and used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append((name, tensor))
        used += size

    path = Path(path).expanduser()
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


def _dense_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, LazyTensor]]:
    """Every weight under its Hugging Face name, computed when read."""
    if isinstance(module, LoraLinear):
        if module.merged is None:
            raise LorakitError(
                "save_model: an adapter is attached; merge it into the weights, or detach it, first"
            )
        yield f"{prefix}weight", LazyTensor(tuple(module.merged.shape), lambda: module.merged)
        if module.base.bias is not None:
            yield (
                f"{prefix}bias",
                LazyTensor(tuple(module.base.bias.shape), lambda: module.base.bias),
            )
        return
    for name, parameter in module.named_parameters(recurse=False):
        if not isinstance(module, NF4Linear):
            yield prefix + name, LazyTensor(tuple(parameter.shape), lambda p=parameter: p)
        elif name == "weight":
            shape = (module.out_features, module.in_features)
            yield prefix + name, LazyTensor(shape, module.dequantize)
        elif name == "bias":
            yield prefix + name, LazyTensor(tuple(parameter.shape), lambda p=parameter: p)
    for name, child in module.named_children():
        yield from _dense_tensors(child, f"{prefix}{name}.")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, atomically."""
    with atomic(path) as temporary:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, temporary, metadata={"format": "pt"})
