"""Loading a model from its files: a Hugging Face directory, a GGUF file, or a Hub id.

A model that is quantized while it is loaded never exists as a dense one. The model is built on the
meta device, where it takes no memory, and the names and shapes of all tensors in the files are
compared with it before the first value is read. Then one tensor at a time is read, packed if it
belongs to a quantized layer, and put in its place:

    peak memory = the model as it will be + twice the largest dense tensor

Files that hold more than a text model (Gemma 3 or Mistral Small 3 with a vision tower) are read for
the text model. The other tensors stay on disk, and `save_model` copies them. So do layers that
draft several tokens at a time (`mtp` in Qwen's files).

Files may come from a stranger. Nothing here unpickles them or runs code from them. Sizes are
checked before memory is taken: a config that asks for more than the files hold is refused while the
model is still on the meta device. A refusal is a LorakitError of one sentence.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorakit import kernels
from lorakit.config.classifier import ClassifierConfig
from lorakit.config.errors import LorakitError, nearest
from lorakit.config.fields import to_dtype
from lorakit.config.quantization import QuantConfig, quant_config
from lorakit.files import hub
from lorakit.files.local import read_json
from lorakit.files.safetensors import LazyTensor, open_directory, other_weights
from lorakit.files.wrappers import renamed, unwrapped
from lorakit.models.bitsandbytes import LazyPacked, LazyWeight, fold_packed, only_dense
from lorakit.models.classifier import decoder_of, with_head
from lorakit.models.config import ModelConfig
from lorakit.models.config_json import text_config
from lorakit.models.decoder import Decoder
from lorakit.models.devices import device_and_mesh
from lorakit.models.families import WRAPPERS
from lorakit.models.fused_experts import split_experts
from lorakit.models.gguf import read_gguf
from lorakit.models.large_pages import homes_in_large_pages
from lorakit.models.multimodal import DRAFTS, split_text_model, text_name
from lorakit.models.packed_layers import PackedWeight, packed_layer
from lorakit.models.packed_layers import quantize as quantize_module
from lorakit.models.per_layer import HostTable, host_tables, left_in_file
from lorakit.models.quantized_files.fold import dequantized
from lorakit.models.sharding import shard
from lorakit.models.shards import is_sharded, keep
from lorakit.models.source import Source

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger("lorakit")


def load_model(
    path_or_hub_id: str | Path,
    *,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | Mapping | QuantConfig | None = None,
    device: str | torch.device | None = None,
    mesh: "DeviceMesh | None" = None,
    offload_weights: bool = False,
    classifier: ClassifierConfig | None = None,
) -> Decoder:
    """Load a causal language model, or one with a head for classes, in evaluation mode.

    Args:
        path_or_hub_id: A Hugging Face directory, a .gguf file, or a Hub id: "organization/name", or
            "organization/name:Q4_K_M" for one of its GGUF files.
        dtype: The dtype of everything that is not quantized, and of all products: "float32",
            "bfloat16" or "float16".
        quantize: A QuantConfig, its fields in a mapping, or its quant_type alone ("nf4", "fp4",
            "int8"). The linear layers are packed while they are loaded, from the values on disk;
            the head and the embeddings only if the config says so. None packs nothing. Weights that
            bitsandbytes packed keep their very codes: `quantize` is not applied to files that hold
            such weights, and a line in the log says so.
        device: The device to put the model on. None takes the GPU if torch has one, else the CPU;
            a process that torchrun has started takes the GPU of its own number.
        mesh: The ranks that divide the weights among them, [ranks] or [copies, ranks], all of which
            load; see models/sharding.py. Memory takes this rank's part and one tensor.
        offload_weights: Whether weights wait in host memory for their block's turn.
        classifier: A new head for classes in the place of the language model's, drawn from torch's
            global generator. Files of a `ForSequenceClassification` have one.

    Returns:
        The model, with `source` set to the files that it came from; a `Classifier` if it has a head
        for classes.

    Raises:
        LorakitError: If a file or tensor is missing, damaged, of the wrong shape or left over, or
            if lorakit does not have what the config asks for.
    """
    dtype, quant = to_dtype(dtype), quant_config(quantize)
    device, mesh = device_and_mesh(device, mesh, offload_weights)
    model, weights, source = open_model(path_or_hub_id, classifier)
    model.to(dtype)
    where = str(source.path)
    source.log_quantized()
    _make_packed_layers(model, weights, quant, where)
    if mesh is not None:
        shard(model, mesh, offload=offload_weights)
    in_pages = device.type == "cpu" and mesh is None
    target = Target(device, homes_in_large_pages(model, dtype) if in_pages else {})
    _fill(model, left_in_file(model, weights), target, source.path)
    return model.eval()


def stored_bytes(path_or_hub_id: str | Path, dtype: torch.dtype, quant: QuantConfig | None) -> int:
    """Return how many bytes the weights of a model will take, without a look at their values."""
    model, weights, source = open_model(path_or_hub_id)
    model.to(dtype)
    _make_packed_layers(model, weights, quant, str(source.path))
    return sum(parameter.nbytes for parameter in model.parameters())


def dense_weights(
    source: Source | None, weights: Mapping[str, Tensor] | None, what: str
) -> dict[str, LazyTensor]:
    """Return the dense weights that a quantized model was made from, by layer, still on disk.

    Args:
        source: The files that the model was loaded from, which are opened again.
        weights: The weights by the layers' names, if the caller has them; then no file is opened.
        what: The name of the caller, for messages.

    Returns:
        The weights by the layers' names, without ".weight".

    Raises:
        LorakitError: If there are no weights and no source, or the source is quantized itself.
    """
    if weights is not None:
        return {name: _in_memory(weight) for name, weight in weights.items()}
    if source is None:
        raise LorakitError(f"{what}: the model was not loaded from a file; give its dense weights")
    _, found, _ = open_model(source.path)
    dense = only_dense(found)
    if dense is None:
        raise LorakitError(
            f"{what}: {source.path} is quantized itself; give the weights it was made from"
        )
    return {name.removesuffix(".weight"): tensor for name, tensor in dense.items()}


def _in_memory(weight: Tensor) -> LazyTensor:
    """Return a weight in memory in the form of one on disk."""
    return LazyTensor(tuple(weight.shape), lambda: weight)


# ---- opening: the model on the meta device, its weights on disk ----------------------------------


def open_model(
    path_or_hub_id: str | Path, classifier: ClassifierConfig | None = None
) -> tuple[Decoder, dict[str, LazyWeight], Source]:
    """Open a model's files: check names and shapes, and read no weight.

    Args:
        path_or_hub_id: A Hugging Face directory, a .gguf file, or a Hub id.
        classifier: As `load_model` takes it.

    Returns:
        The model on the meta device; its weights by name, still on disk; and where they are.

    Raises:
        LorakitError: As `load_model` does.
    """
    wanted = [*hub.MODEL_FILES, *hub.TOKENIZER_FILES, *hub.PROCESSOR_FILES, hub.CARD]
    path = hub.resolve(path_or_hub_id, wanted)
    weights: Mapping[str, LazyWeight]
    drafts: dict[str, LazyWeight] = {}
    surroundings = None
    kinds: Mapping[str, int] = {}
    if path.suffix == ".gguf":
        config, weights = read_gguf(path)
    else:
        values = _read_config(path)
        config = ModelConfig.from_hf(values, str(path / "config.json"))
        said = text_config(values, str(path))[0]
        quantization = said.get("quantization_config")
        weights, kinds = dequantized(_open_weights(path), quantization, str(path))
        weights = fold_packed(weights, str(path))
        if values["model_type"] in WRAPPERS:
            weights, surroundings = split_text_model(weights, values, str(path))
        else:
            own_names = {name: text_name(name) for name in weights}
            weights = renamed(weights, own_names, str(path), "a multimodal model")
            drafts = {n: tensor for n, tensor in weights.items() if n.startswith(DRAFTS)}
            weights = {n: tensor for n, tensor in weights.items() if n not in drafts}
        weights = split_experts(weights, config, str(path))
        named = "eos_token_id" in said
        config = _with_end_tokens(config, path / "generation_config.json", named)
        unsaid = surroundings is not None and "tie_word_embeddings" not in said
        config = _tied_as_stored(config, weights, path, unsaid)
    if classifier is not None:
        config, drawn = with_head(config, classifier, str(path))
        weights = {**weights, "score.weight": drawn}
    if config.classifier is not None:  # it tells of text alone, once
        surroundings, drafts = None, {}
    model = _empty_model(config, weights, str(path))
    model.source = Source(path.absolute(), surroundings, drafts, kinds)
    return model, _selected(weights, model, str(path)), model.source


def _read_config(path: Path) -> dict[str, Any]:
    """Return the contents of config.json, with what ModelOpt says of the quantization beside it.

    Raises LorakitError that says what else the directory holds if the file is missing.
    """
    what = None if (path / "config.json").exists() else other_weights(path)
    if what is not None:
        raise LorakitError(f"{path}: config.json is missing, and the directory holds {what}")
    values = read_json(path / "config.json")
    beside = path / hub.MODELOPT
    if values.get("quantization_config") is None and beside.exists():
        values["quantization_config"] = {"quant_method": "modelopt"}
    return values


def _open_weights(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a directory, by their names without those of wrappers.

    Raises LorakitError if an adapter lies among them, or experts as MLX stores them.
    """
    wrappers = {"module.": "", "base_model.model.": ""}  # the second is PEFT's
    tensors = unwrapped(open_directory(path), str(path), wrappers)
    for name in tensors:
        if ".lora_" in name:
            raise LorakitError(
                f"{path}: tensor {name} is of an adapter, in the file of its base model: save the "
                "adapter by itself with PEFT's save_pretrained, or merge it with merge_and_unload"
            )
        if ".switch_mlp." in name:
            raise LorakitError(
                f"{path}: tensor {name} holds all experts of a layer, as MLX stores them, which is "
                "not read: load the model that was converted to MLX"
            )
    return tensors


def _with_end_tokens(config: ModelConfig, file: Path, named: bool) -> ModelConfig:
    """Return `config` with the end tokens of a generation_config.json too, where there is one.

    If config.json named none (`named` is false), they take the place of the family's default.
    """
    if not file.exists():
        return config
    more = read_json(file).get("eos_token_id")
    more = [] if more is None else more if isinstance(more, list) else [more]
    if not all(type(token) is int for token in more):
        raise LorakitError(
            f"{file}: eos_token_id must be a number or a list of numbers, not {more!r}"
        )
    ends = list(dict.fromkeys([*config.eos_token_ids, *more] if named or not more else more))
    if ends == config.eos_token_ids:
        return config
    return dataclasses.replace(config, eos_token_id=ends)


def _tied_as_stored(
    config: ModelConfig, weights: Mapping[str, LazyWeight], path: Path, unsaid: bool
) -> ModelConfig:
    """Return `config`, untied if the files hold a head that is not the embedding.

    If the config of a wrapper says nothing (`unsaid`), only this decides: what that means to
    transformers has changed between its versions.
    """
    if unsaid:
        config = dataclasses.replace(config, tie_word_embeddings=True)
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None or embedding is None:
        return config
    if _same_values(head, embedding):
        return config
    if not unsaid:
        log.warning(
            "lorakit: %s: the config ties head and embedding, the weights differ; kept apart", path
        )
    return dataclasses.replace(config, tie_word_embeddings=False)


def _same_values(a: LazyWeight, b: LazyWeight) -> bool:
    if not isinstance(a, LazyTensor) or not isinstance(b, LazyTensor):
        return False
    return a.shape == b.shape and torch.equal(a.read(), b.read())


def _empty_model(config: ModelConfig, weights: Mapping[str, LazyWeight], where: str) -> Decoder:
    """Build the model on the meta device; refuse sizes that the files do not hold, or none can."""
    last = f"model.layers.{config.num_hidden_layers - 1}.post_attention_layernorm.weight"
    if last not in weights:  # checked first: a damaged config may ask for a million layers
        raise LorakitError(f"{where}: tensor {last} is missing")
    expert = f".experts.{config.num_experts - 1}."  # or for as many experts
    if any(config.moe_layers) and not any(expert in name for name in weights):
        raise LorakitError(
            f"{where}: the config asks for {config.num_experts} experts, and the files do not hold "
            "the last of them"
        )
    try:
        with torch.device("meta"):
            return decoder_of(config)
    except RuntimeError as error:
        raise LorakitError(f"{where}: the config's sizes are impossible ({error})") from None


def _selected(
    weights: Mapping[str, LazyWeight], model: Decoder, where: str
) -> dict[str, LazyWeight]:
    """Return the weights of the model, in its order.

    Raises LorakitError if one is missing, of another shape than the model's, or left over.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected |= {name: tuple(t.weight.shape) for name, t in host_tables(model).items()}
    for name, shape in expected.items():
        if name not in weights:
            raise LorakitError(f"{where}: tensor {name} is missing{nearest(name, weights)}")
        if weights[name].shape != shape:
            raise LorakitError(
                f"{where}: tensor {name} is {weights[name].shape}, the config asks for {shape}"
            )
    for name in weights:
        # Old files store the rotary frequencies. Tied models may store the embedding as head too.
        derived = name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
        if name in expected or derived or _of_shared_keys(name, model.config):
            continue
        if not _is_zero_bias(name, weights, expected):
            raise LorakitError(f"{where}: tensor {name} belongs to no part of the model")
    return {name: weights[name] for name in expected}


def _of_shared_keys(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor would make keys or values that a layer takes from an earlier one.

    Some files of Gemma 4 hold such tensors, which nothing computes with.
    """
    found = re.match(r"model\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.", name)
    return found is not None and config.kv_source(int(found[1])) is not None


def _is_zero_bias(
    name: str, weights: Mapping[str, LazyWeight], expected: Mapping[str, tuple[int, ...]]
) -> bool:
    """Return whether a tensor is a bias of zeros beside a weight that the model has without bias.

    Early versions of AutoGPTQ wrote such biases for all linear layers, and they compute nothing.
    """
    layer, _, leaf = name.rpartition(".")
    bias, shape = weights[name], expected.get(f"{layer}.weight")
    if leaf != "bias" or shape is None or bias.shape != shape[:1]:
        return False
    return isinstance(bias, LazyTensor) and not bias.read().any()


# ---- filling: every weight is read, packed where it has to be, and put in its place --------------


def _make_packed_layers(
    model: Decoder, weights: Mapping[str, LazyWeight], quant: QuantConfig | None, where: str
) -> None:
    """Put empty packed layers where the files hold packed weights, or else where `quant` says."""
    packed = {name: w.config for name, w in weights.items() if isinstance(w, LazyPacked)}
    for name, config in packed.items():
        _make_shell(model, name, config, where)
    if quant is not None and packed:
        kinds = " and ".join(sorted({config.quant_type for config in packed.values()}))
        log.warning("lorakit: %s is quantized already (%s); it stays as it is", where, kinds)
    elif quant is not None:
        quantize_module(model, quant)


def _make_shell(model: nn.Module, tensor: str, config: QuantConfig, where: str) -> None:
    """Put an empty packed layer in the place of the dense one that owns `tensor`."""
    name, _, leaf = tensor.rpartition(".")
    layer = model.get_submodule(name)
    if leaf != "weight" or type(layer) not in (nn.Linear, nn.Embedding):
        raise LorakitError(
            f"{where}: tensor {tensor} is stored packed, which only the weights of linear layers "
            "and embeddings can be"
        )
    assert isinstance(layer, nn.Linear | nn.Embedding)
    model.set_submodule(name, packed_layer(layer, config))


def _fill(model: Decoder, weights: Mapping[str, LazyWeight], target: "Target", path: Path) -> None:
    """Read the weights one after the other, and put each in its place."""
    for name, weight in tqdm(
        weights.items(), desc=f"loading {path.name}", unit="tensor", disable=None, leave=False
    ):
        try:
            place(model, name, weight.read(), target)
        except ValueError as error:
            raise LorakitError(f"{path}: tensor {name}: {error}") from None


class Target(NamedTuple):
    """The place that weights go to."""

    device: torch.device
    """The device of all weights."""
    homes: Mapping[str, Tensor]
    """Memory that waits for parameters, by their names; the others get memory of their own."""

    def copied(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of `value` for parameter `name`; a value that was read may view a file."""
        home = self.homes.get(name)
        if home is not None:
            return home.copy_(value)
        return value.to(self.device, dtype, copy=True)


def place(model: nn.Module, name: str, value: Tensor | kernels.Packed, target: Target) -> None:
    """Put a value that was read in the place of parameter `name`, packed if its layer is."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(value, Tensor) and (not value.is_floating_point() or value.itemsize < 2):
        raise ValueError(f"holds {value.dtype}; only weights of 16 bits and more are read")
    if isinstance(owner, HostTable):
        if not isinstance(value, Tensor):
            raise ValueError("is packed; the second embedding is read dense")
        owner.weight = value  # as it lies in the file, which stays mapped
        return
    if not isinstance(owner, PackedWeight) or leaf != "weight":
        assert isinstance(value, Tensor)  # a packed value has the shell of a packed layer
        empty = owner.get_parameter(leaf)  # the shell knows its dtype, which may stay fp32
        if is_sharded(empty):
            keep(empty, value)
            return
        copied = target.copied(name, value, empty.dtype)
        setattr(owner, leaf, nn.Parameter(copied, empty.requires_grad))
        return
    if isinstance(value, Tensor):
        owner.requantize(value, target.device)
    else:
        owner.place(value)
    for part, parameter in owner.named_parameters(recurse=False):
        if part != "bias" and not is_sharded(parameter):
            part_name = f"{owner_name}.{part}"
            parameter.data = target.copied(part_name, parameter.data, parameter.dtype)
