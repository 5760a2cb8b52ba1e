"""Saving a model as a Hugging Face directory, which transformers and lorakit load again.

Each file is written to a temporary file beside it, flushed and renamed: a reader sees the old file
or the new one. Nothing is written to the network. Weights are computed one shard at a time, so that
memory never holds the model a second time.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.config.errors import LorakitError
from lorakit.config.quantization import QuantConfig
from lorakit.files import hub
from lorakit.files.local import as_path, copy_file, write_json
from lorakit.files.safetensors import INDEX_FILE, WEIGHTS_FILE, LazyTensor, write_safetensors
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.bitsandbytes import only_dense
from lorakit.models.classifier import Score
from lorakit.models.config import ModelConfig
from lorakit.models.config_json import is_flat
from lorakit.models.decoder import Decoder
from lorakit.models.fused_experts import FusedTensor, fused_parts
from lorakit.models.multimodal import Surroundings
from lorakit.models.packed_layers import Int8Linear, NF4Linear, PackedLinear, PackedWeight
from lorakit.models.per_layer import HostTable
from lorakit.models.sharding import writes_files
from lorakit.models.shards import whole
from lorakit.models.source import Source
from lorakit.models.tokenizer_files import load_tokenizer

log = logging.getLogger("lorakit")
_COPIED = ["generation_config.json", *hub.PROCESSOR_FILES, *hub.TOKENIZER_FILES]
_COPIED += ["additional_chat_templates/*.jinja"]


class _Entry(NamedTuple):
    """One tensor that is to be written."""

    name: str
    """Its name in the files."""
    nbytes: int
    """The bytes of its values."""
    read: Callable[[], Tensor]
    """Computes its values, or reads them."""


def save_model(
    module: Decoder,
    path: str | Path,
    *,
    packed: bool = False,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a model as a Hugging Face directory.

    Merged adapters are written as merged. What lies beside the weights that the model was loaded
    from goes along byte for byte: all files of the tokenizer (tokenizer.model and vocab.json too),
    of the processors and of the generation config. So do the other towers of a multimodal model. A
    tokenizer that was changed in memory is saved after the model, by its own `save`.

    All ranks of a sharded model must call it, and the first one writes; memory holds one file at a
    time there, and one tensor on the others.

    Args:
        module: The model.
        path: The directory. It is made if it is missing.
        packed: False writes dense weights in the model's dtype; packed layers are dequantized. True
            writes packed linear layers as they are, in bitsandbytes' format, so that lorakit and
            transformers with bitsandbytes load the very same numbers. Everything else is dense, and
            so are embeddings. One directory is in 4 bits or in int8: beside 4-bit layers, int8 ones
            are written dense.
        max_shard_size: The size of the largest file in bytes. One tensor may exceed it. Memory
            holds one such file at a time.

    Raises:
        LorakitError: If an adapter is attached and not merged; if the other towers are packed, or
            lie in `path` itself; and with `packed`, if no linear layer is packed or the model is
            multimodal. Nothing is written then.
        OSError: If the disk is full. A file that was there before is whole, old or new.
    """
    path, source = as_path(path), module.source
    config, entries = _contents(module, path, packed)
    if not writes_files(module.mesh):
        for entry in entries:  # this rank's parts are wanted by the one that writes
            entry.read()
        return
    in_order = _InOrder(entries)
    try:
        _write(path, config, in_order.entries, max_shard_size)
    finally:
        if module.mesh is not None:  # the others send all parts, whatever came in between
            in_order.read_rest()
    if source is not None:
        _copy_beside(source.path, path, module.config)


def send_parts(module: Decoder, path: Path) -> None:
    """Meet the ranks that call `save_model` for a sharded model and this path; write nothing."""
    for entry in _contents(module, path, packed=False)[1]:
        entry.read()


def _contents(module: Decoder, path: Path, packed: bool) -> tuple[dict[str, Any], list[_Entry]]:
    """Return config.json, and all tensors in the order in which they are written."""
    source = module.source
    surroundings = None if source is None else source.surroundings
    if not _is_merged(module):
        raise LorakitError(
            "save_model: an adapter is attached; merge it into the weights, or detach it, first"
        )
    config = module.config.to_hf() | {"torch_dtype": str(module.dtype).removeprefix("torch.")}
    config["tie_word_embeddings"] = _is_tied(module)
    towers = {} if source is None else other_towers(source, path, packed)
    kept = None
    if packed:
        kept, config["quantization_config"] = _packed_form(module)
    entries = list(_entries(module, kept))
    if module.config.fused_experts:
        entries = _with_fused_experts(entries, module.config)
    if surroundings is not None:
        config, entries = _surrounded(config, entries, surroundings)
    entries += [_Entry(name, tower.read().nbytes, tower.read) for name, tower in towers.items()]
    return config, entries


class _InOrder:
    """Tensors that are read one after the other, and those that were not read yet."""

    def __init__(self, entries: Iterable[_Entry]):
        self.left = deque(entries)
        self.entries = [entry._replace(read=partial(self._read, entry)) for entry in self.left]

    def _read(self, entry: _Entry) -> Tensor:
        assert self.left.popleft() is entry
        return entry.read()

    def read_rest(self) -> None:
        """Read and forget the tensors that are left."""
        while self.left:
            self.left.popleft().read()


# ---- adapters and packed layers ------------------------------------------------------------------


def _is_merged(module: nn.Module) -> bool:
    """Return whether the model computes with its weights alone, adapters merged or absent.

    Merging goes through all layers at once, so one merged layer tells that it was done.
    """
    found = [each for each in module.modules() if isinstance(each, AdaptedLayer)]
    return any(each.merged is not None for each in found) or not found


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by name; an adapted one as its base, or as the merged layer."""
    if isinstance(module, AdaptedLayer):
        module = module.current_module()
    yield name, module
    for leaf, child in module.named_children():
        yield from _layers(child, f"{name}.{leaf}" if name else leaf)


def _is_tied(module: Decoder) -> bool:
    """Return whether the head is the embedding.

    A tied model may have a head of its own, with the embedding's weight or, merged, with another.
    """
    layers = dict(_layers(module))
    if "lm_head" not in layers:  # a head for classes is neither
        return module.config.classifier is None or module.config.tie_word_embeddings
    head, embedding = layers["lm_head"], layers["model.embed_tokens"]
    return head._parameters.get("weight") is embedding._parameters.get("weight")


def _packed_form(module: Decoder) -> tuple[type[PackedLinear], dict[str, Any]]:
    """Return the kind of layers that are written packed, and their quantization_config."""
    layers = dict(_layers(module))
    linear = [layer for layer in layers.values() if isinstance(layer, PackedLinear)]
    if not linear:
        raise LorakitError("save_model: packed=True, but no linear layer is packed")
    four_bits = any(isinstance(layer, NF4Linear) for layer in linear)
    kept: type[PackedLinear] = NF4Linear if four_bits else Int8Linear
    others = {name: layer for name, layer in layers.items() if not isinstance(layer, kept)}
    unpacked = [name for name, layer in others.items() if isinstance(layer, PackedWeight)]
    if unpacked:
        log.warning("lorakit: save_model: written dense: %s", ", ".join(unpacked))
    if any("experts." in name for name in layers.keys() - others.keys()):
        log.warning(
            "lorakit: save_model: packed experts load in lorakit and transformers 4; "
            "transformers 5 has none"
        )
    # transformers must not expect these packed. Its models have a head of their own even where that
    # is the embedding.
    kinds = (nn.Linear, PackedLinear, Score)
    dense = {name for name, layer in others.items() if isinstance(layer, kinds)}
    if module.lm_head is None:
        dense.add("lm_head")
    first = next(layer.config for layer in linear if isinstance(layer, kept))
    return kept, _quantization_config(first, sorted(dense), module.dtype)


def _quantization_config(
    packed: QuantConfig, dense: list[str], dtype: torch.dtype
) -> dict[str, Any]:
    """Return config.json's quantization_config; `dense` are the linear layers that stay dense."""
    four_bits = packed.quant_type != "int8"
    values = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four_bits,
        "load_in_8bit": not four_bits,
        "llm_int8_skip_modules": dense,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
    if four_bits:
        values |= {
            "bnb_4bit_quant_type": packed.quant_type,
            "bnb_4bit_use_double_quant": packed.double_quant,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }
    return values


def _entries(module: Decoder, kept: type[PackedLinear] | None) -> Iterator[_Entry]:
    """Yield every tensor of the model: layers of type `kept` packed, all others dense."""
    tied = _is_tied(module)
    for layer_name, layer in _layers(module):
        if tied and layer_name == "lm_head":
            continue
        prefix = f"{layer_name}." if layer_name else ""
        tensors: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, HostTable):  # written from the file that it is mapped from
            yield _Entry(f"{prefix}weight", layer.weight.nbytes, layer.read)
        if isinstance(layer, PackedWeight):
            tensors = {name: tensor for name, tensor in tensors.items() if name == "bias"}
            if kept is not None and isinstance(layer, kept):
                once = _PackedTensors(layer)
                for name, tensor in layer.whole().tensors("weight").items():
                    yield _Entry(prefix + name, tensor.nbytes, partial(once.read, name))
            else:
                size = math.prod(layer.shape) * layer.dtype.itemsize
                yield _Entry(f"{prefix}weight", size, layer.dequantize)
        for name, tensor in tensors.items():
            yield _Entry(prefix + name, tensor.nbytes, partial(_values, tensor))


class _PackedTensors:
    """The tensors that a packed weight is in a file; those of a sharded one are gathered once."""

    def __init__(self, layer: PackedLinear):
        self.layer = layer
        self.left: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """Return one of them, of which each is asked for once in a round."""
        if name not in self.left:
            self.left = self.layer.whole().tensors("weight")
        return self.left.pop(name)


def _values(tensor: Tensor) -> Tensor:
    return whole(tensor.detach())


def _with_fused_experts(entries: Iterable[_Entry], config: ModelConfig) -> list[_Entry]:
    """Return the tensors of a model with those of single experts in fused ones."""
    left = {entry.name: entry for entry in entries}
    fused = []
    for name, (kind, parts) in fused_parts(left, config).items():
        experts = [[left.pop(part) for part in expert] for expert in parts]
        size = sum(part.nbytes for expert in experts for part in expert)
        fused.append(_Entry(name, size, partial(_stacked, kind, experts)))
    return [*left.values(), *fused]


def _stacked(kind: FusedTensor, experts: Iterable[Iterable[_Entry]]) -> Tensor:
    """Return a fused tensor of all experts, given their parts."""
    return torch.stack([kind.joined([part.read() for part in expert]) for expert in experts])


# ---- multimodal models ---------------------------------------------------------------------------


def other_towers(source: Source, path: Path, packed: bool) -> dict[str, LazyTensor]:
    """Return the tensors at `source` that are no part of the text model.

    Raises LorakitError if they cannot be written to `path`, or not together with a packed text.
    """
    around = {} if source.surroundings is None else source.surroundings.tensors
    tensors = source.drafts | around
    if tensors and path.resolve() == source.path.resolve():
        raise LorakitError(
            f"save_model: tensors that are no part of the text model are read from {path} while it "
            "writes; choose another directory"
        )
    towers = only_dense(tensors)
    if towers is None:
        raise LorakitError("save_model: towers that are packed beside a dense text are not written")
    if packed and source.surroundings is not None:
        raise LorakitError("save_model: a multimodal model is written with packed=False only")
    return towers


def _surrounded(
    config: dict[str, Any],
    entries: Iterable[_Entry],
    surroundings: Surroundings,
) -> tuple[dict[str, Any], list[_Entry]]:
    """Return the config of the whole model, and the text model's tensors by their names there."""
    found = [entry._replace(name=surroundings.file_name(entry.name)) for entry in entries]
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
    text: dict[str, Any] = {"text_config": config}
    if is_flat(surroundings.config):
        text = {n: v for n, v in config.items() if n not in ("model_type", "architectures")}
    whole = surroundings.config | tied | text
    whole.pop("quantization_config", None)  # the text is dense now
    return whole, found


# ---- files ---------------------------------------------------------------------------------------


def _write(
    path: Path, config: dict[str, Any], entries: Iterable[_Entry], max_shard_size: int
) -> None:
    """Write tensors and config, and remove the files of an earlier model."""
    path.mkdir(parents=True, exist_ok=True)
    weight_map = _write_weights(path, entries, max_shard_size)
    write_json(path / "config.json", config)
    _remove_stale(path, set(weight_map.values()))


def _write_weights(path: Path, entries: Iterable[_Entry], max_shard_size: int) -> dict[str, str]:
    """Write the tensors into one file, or several with an index, and return each tensor's file."""
    shards: list[list[_Entry]] = [[]]
    used = total = 0
    for entry in entries:
        total += entry.nbytes
        if shards[-1] and used + entry.nbytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = WEIGHTS_FILE
        if len(shards) > 1:
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(path / file, {entry.name: entry.read() for entry in shard})
        weight_map |= {entry.name: file for entry in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(path / INDEX_FILE, index)
    return weight_map


def _remove_stale(path: Path, written: set[str]) -> None:
    """Remove the files of an earlier save in other shards.

    A reader would take them first, or they would lie there unread.
    """
    if written != {WEIGHTS_FILE}:
        written = {*written, INDEX_FILE}
    found = {WEIGHTS_FILE, INDEX_FILE, *(file.name for file in path.glob("model-*.safetensors"))}
    for stale in found - written:
        (path / stale).unlink(missing_ok=True)


def _copy_beside(source: Path, path: Path, config: ModelConfig) -> None:
    """Write tokenizer and generation config to `path`, from where the model was loaded."""
    if not source.exists():
        log.warning("lorakit: %s is gone; no tokenizer was written to %s", source, path)
    elif source.is_dir():
        _copy_files(source, path)
    else:
        ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        given = {name: tokens for name, tokens in ends.items() if tokens is not None}
        write_json(path / "generation_config.json", given)
        try:
            load_tokenizer(source).save(path)
        except LorakitError as error:
            log.warning("lorakit: no tokenizer was written to %s: %s", path, error)


def _copy_files(source: Path, path: Path) -> None:
    """Copy what belongs to a model beside its weights from one directory to another."""
    for pattern in _COPIED:
        for file in filter(Path.is_file, source.glob(pattern)):
            copy_file(file, path / file.relative_to(source))
