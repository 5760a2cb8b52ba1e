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
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorakit import kernels
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.fields import to_dtype
from lorakit.config.quantization import QuantConfig, quant_config
from lorakit.files import hub
from lorakit.files.local import read_json
from lorakit.files.safetensors import LazyTensor, open_directory
from lorakit.models.bitsandbytes import fold_packed
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.models.families import MULTIMODAL
from lorakit.models.gguf import read_gguf
from lorakit.models.large_pages import HUGE_PAGE, in_large_pages
from lorakit.models.multimodal import Surroundings, split_text_model
from lorakit.models.packed_layers import PackedWeight, packed_layer
from lorakit.models.packed_layers import quantize as quantize_module

log = logging.getLogger("lorakit")


class Source(NamedTuple):
    """Where a model was loaded from."""

    path: Path  # a directory or a .gguf file
    surroundings: Surroundings | None


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
    surroundings = None
    if path.suffix == ".gguf":
        config, found = read_gguf(path)
        tensors = {name: LazyTensor(*entry) for name, entry in found.items()}
    else:
        values = read_json(path / "config.json")
        config = ModelConfig.from_hf(values, str(path / "config.json"))
        tensors = fold_packed(open_directory(path), str(path))
        if values["model_type"] in MULTIMODAL:
            tensors, surroundings = split_text_model(tensors, values, str(path))
        config = _completed(config, path, tensors)
    model = _empty_model(config, tensors, str(path))
    model.source = Source(path.absolute(), surroundings)
    return model, _select(tensors, model, str(path))


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
