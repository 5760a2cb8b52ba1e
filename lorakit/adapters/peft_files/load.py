"""Load an adapter that lorakit or PEFT wrote onto a model; save.py tells what the files hold.

Beside the adapter's own tensors a file may hold

    -  full copies of embeddings and heads, which PEFT adds. They are compared with the model's own
       weights. A copy that differs under an adapter means that the adapter was trained on another
       model; vocabulary.py has the others
    -  the tensors of a head that is tied to an adapted embedding (ties.py). They must equal the
       embedding's
    -  adapters of fused experts (fused_experts.py). They are split into one for each expert

Any other tensor raises an error, and so does one that is missing. A file that names modules as a
multimodal model does also fits the text model alone (text_part.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attach import attach
from lorakit.adapters.manage import (
    adapter_config,
    attached,
    delete_adapter,
    selected_adapter,
    set_adapter,
)
from lorakit.adapters.methods.known import METHODS, method_called, method_of
from lorakit.adapters.methods.method import Method
from lorakit.adapters.peft_files import features
from lorakit.adapters.peft_files.fused_experts import without_absent_experts, without_parameters
from lorakit.adapters.peft_files.labels import SEQ_CLS
from lorakit.adapters.peft_files.layout import PREFIX, AdapterFiles, name_in
from lorakit.adapters.peft_files.opened import open_files
from lorakit.adapters.peft_files.text_part import text_part
from lorakit.adapters.peft_files.ties import TWINS, adapted_embedding_of, adapted_heads
from lorakit.adapters.peft_files.vocabulary import fit_vocabulary, vocabulary_kept
from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor
from lorakit.models.classifier import classifier_in
from lorakit.models.decoder import Decoder


def load_adapter(module: nn.Module, path: str | Path, *, name: str = "default") -> nn.Module:
    """Attach an adapter that was saved to a module, in place, and select it.

    It may be of PEFT, lorakit or mlx_lm, or a .gguf file for llama.cpp.

    An adapter that was trained with more tokens gives a `Decoder` without adapters rows for them,
    as `resize_embeddings` does, and a line in the log says so.

    Args:
        module: The module; it keeps the adapters that it has.
        path: The directory of adapter_config.json and the adapter's safetensors, a .gguf file,
            or a Hub id.
        name: What to call the adapter.

    Returns:
        `module`.

    Raises:
        LorakitError: A file is missing or truncated, the adapter uses a feature of PEFT that
            lorakit does not have, or tensors are missing, unknown or of another shape. `module` is
            then as it was.
    """
    method, files = _open(path, module)
    with vocabulary_kept(module):
        files = fit_vocabulary(files, module)
        config = method.read_config(files, module)
        trainable = {p: p.requires_grad for p in module.parameters()}
        before = selected_adapter(module)
        attach(module, config, name=name)
        try:
            _fill(module, name, files)
        except BaseException:
            delete_adapter(module, name)
            if before is not None:
                set_adapter(module, before)
            for parameter, required in trainable.items():
                parameter.requires_grad_(required)
            raise
    return module


def read_settings(path: str | Path, module: nn.Module) -> Any:
    """Return the settings of an adapter that was saved, without its tensors.

    Args:
        path: The adapter, as `load_adapter` takes it.
        module: The module that it is for, which stays as it is and may have no values.

    Returns:
        What `attach` takes: a `LoraConfig` or the config of another method.

    Raises:
        LorakitError: A file is missing or damaged, or the adapter uses a feature of PEFT that
            lorakit does not have.
    """
    method, files = _open(path, module)
    return method.read_config(files, module)


def _open(path: str | Path, module: nn.Module) -> tuple[Method[Any], AdapterFiles]:
    """Return the method of an adapter and its files, which name the layers of `module`.

    Raises LorakitError for what lorakit lacks.
    """
    files = open_files(path, module)
    kind = files.values.get("peft_type")
    method = method_called(kind)
    if method is None:
        known = ", ".join(method.peft_type for method in METHODS)
        raise LorakitError(f"{files.path}: peft_type is {kind!r}; lorakit has {known}")
    features.check_file(files.path, files.values)
    if files.values.get("task_type") == SEQ_CLS and isinstance(module, Decoder):
        classifier_in(module, str(files.path))
    if files.values.get("target_parameters"):
        files = without_parameters(files, module)
    return method, without_absent_experts(text_part(files, module), module)


@torch.no_grad()
def _fill(module: nn.Module, name: str, files: AdapterFiles) -> None:
    """Give the attached adapter `name` the values that the file holds."""
    config = adapter_config(module, name)
    method = method_of(config)
    expected: dict[str, Tensor] = {
        method.key(place, ending).removeprefix(PREFIX): parameter
        for place, wrapper in attached(module).items()
        if name in wrapper.adapters
        for ending, parameter in wrapper.loadable_tensors(name).items()
    }
    expected |= method.shared_tensors(module, name, config)
    found = _matched(files, module, expected, method.takes_from_the_base(config))
    for key, parameter in expected.items():
        tensor = found[key].read()
        if tensor.is_floating_point() != parameter.is_floating_point():
            raise LorakitError(f"{files.path}: tensor {_full(key)} is of {tensor.dtype}")
        parameter.copy_(tensor)


def _matched(
    files: AdapterFiles, module: nn.Module, expected: Mapping[str, Tensor], base_changed: bool
) -> dict[str, LazyTensor]:
    """Return the tensors of the file by the keys of `expected`, all there and none too many.

    `base_changed` says that PEFT took the adapter's start out of the base weights whose copies it
    added. Then a copy need not equal the model's own weight.
    """
    found, keys = {}, {}
    for key, tensor in files.tensors.items():
        inner = key.removeprefix(PREFIX)
        inner = inner if inner in expected else name_in(module, inner)
        found[inner], keys[inner] = tensor, key
    for inner in found:
        if inner in expected or _is_copy(files.path, module, inner, found[inner], base_changed):
            continue
        if not _is_twin(files.path, module, inner, found):
            raise LorakitError(
                f"{files.path}: tensor {keys[inner]} belongs to no adapted layer of this model"
            )
    for head, place in adapted_heads(module).items():
        for ending, (other, _) in TWINS.items():
            if f"{place}.{other}" in expected and f"{head}.{ending}" not in found:
                raise LorakitError(
                    f"{files.path}: {place} is adapted, and {head}, which has its weight in this "
                    "model, is not: the adapter was trained without tying them "
                    "(ensure_weight_tying)"
                )
    for key, parameter in expected.items():
        if key not in found:
            raise LorakitError(f"{files.path}: tensor {_full(key)} is missing")
        if 0 in found[key].shape and 0 not in parameter.shape:  # AdaLoRA may leave a layer nothing
            raise LorakitError(
                f"{files.path}: tensor {_full(key)} is empty: DeepSpeed ZeRO-3 or FSDP saved it "
                "before its parts were gathered"
            )
        if found[key].shape != tuple(parameter.shape):
            raise LorakitError(
                f"{files.path}: tensor {_full(key)} is {found[key].shape}, "
                f"the model needs {tuple(parameter.shape)}"
            )
    return found


def _full(key: str) -> str:
    """Return the key of a tensor in the file, which has a prefix if it belongs to a module."""
    return key if key.startswith("base_model.") or "." not in key else PREFIX + key


def _is_copy(
    path: Path, module: nn.Module, key: str, tensor: LazyTensor, base_changed: bool
) -> bool:
    """Return whether `key` is the weight of an adapted embedding or head, which PEFT adds.

    Raises LorakitError unless it is the model's own weight: with another one the adapter was
    trained on another model.
    """
    place, base, _ = key.rpartition(".base_layer.weight")
    wrapper = attached(module).get(adapted_embedding_of(module, place) or place)
    if not base or wrapper is None:
        return False
    own = wrapper.original._parameters.get("weight")
    if own is None or not own.is_floating_point():
        return True  # packed: not comparable bit by bit
    same = base_changed or torch.equal(tensor.read().to(own), own)
    if tensor.shape != tuple(own.shape) or not same:
        raise LorakitError(
            f"{path}: {key} differs from the model's: the adapter was trained on another model; if "
            "it has more tokens, load it onto the model as it was, which then gets its rows"
        )
    return True


def _is_twin(path: Path, module: nn.Module, key: str, tensors: Mapping[str, LazyTensor]) -> bool:
    """Return whether `key` is a tensor that PEFT writes for a tied head.

    Raises LorakitError unless it equals the tensor of the embedding in the file.
    """
    for ending, (other, transposed) in TWINS.items():
        embedding = adapted_embedding_of(module, key.removesuffix(f".{ending}"))
        twin = tensors.get(f"{embedding}.{other}")
        if embedding is None or twin is None:
            continue
        own = twin.read().t() if transposed else twin.read()
        if not torch.equal(tensors[key].read(), own):
            raise LorakitError(
                f"{path}: {key} differs from {embedding}.{other}, and in this model they are tied"
            )
        return True
    return False
