"""Whole embeddings and heads in PEFT's files, and vocabularies that are larger than the model's.

PEFT adds the whole embedding and the whole head to an adapter's file if it is asked to
(save_embedding_layers), or if the vocabulary was resized. With X for either of them the keys are

    X.weight                     the weight of a module that the adapter leaves alone, or that it
                                 trains whole (modules_to_save)
    X.base_layer.weight          the weight under an adapter; load.py compares it
    X.original_module.weight     the weight beside one that is trained whole
    X.modules_to_save.weight     the trained weight a second time
    X.token_adapter.base_layer.weight    the weight of which some rows are trained

`fit_vocabulary` brings such files to the form that all others have. A whole weight that equals the
model's is left out. One that differs is trained in the sense of PEFT, which puts it in the place of
the model's: it becomes one of modules_to_save. If the file has more tokens than the model, then the
model gets rows for them first. They are the file's where it holds them, and else the mean of the
others (models/resize.py).
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.manage import adapter_names, outer_modules
from lorakit.adapters.peft_files.layout import PREFIX, AdapterFiles, name_in
from lorakit.adapters.tied_weights import is_embedding, original
from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor
from lorakit.models.classifier import is_tied
from lorakit.models.decoder import Decoder
from lorakit.models.resize import add_rows

log = logging.getLogger("lorakit")

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
# The endings of tensors with one row for each token, and the one with a column for each.
_BY_ROWS = ("weight", "modules_to_save.weight", "original_module.weight", "base_layer.weight")
_BY_COLUMNS = "lora_embedding_A"
# Where the weight stands that lies under an adapter, or beside a trained one.
_UNTRAINED = ("original_module.weight", "base_layer.weight", "token_adapter.base_layer.weight")


_ROWS = ".token_adapter.trainable_tokens_delta"


@contextmanager
def vocabulary_kept(module: nn.Module) -> Iterator[None]:
    """Give a decoder its embedding and head back if the `with` block raises an error."""
    if not isinstance(module, Decoder):
        yield
        return
    config, embedding, head = module.config, module.model.embed_tokens, module.lm_head
    try:
        yield
    except BaseException:
        if module.config is not config:
            module.config, module.model.embed_tokens, module.lm_head = config, embedding, head
        raise


@torch.no_grad()
def fit_vocabulary(files: AdapterFiles, module: nn.Module) -> AdapterFiles:
    """Return an adapter without copies of the model's weights; the model may get more tokens.

    Args:
        files: The adapter as PEFT saved it.
        module: The module that it is to be loaded onto. A decoder of fewer tokens grows.

    Returns:
        The files, in which `modules_to_save` names every weight that stands there whole.

    Raises:
        LorakitError: The model has fewer tokens and carries adapters, or tied weights differ.
    """
    tensors = _without_second_names(files)
    if isinstance(module, Decoder):
        _grow(module, files, tensors)
    given = files.values.get("modules_to_save")
    saved = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    own = {name: each for name, each in outer_modules(module) if is_embedding(each)}
    own |= {name: each for name, each in outer_modules(module) if name.endswith(_HEAD)}
    if isinstance(module, Decoder) and is_tied(module):
        own[_HEAD] = own[_EMBEDDING]
    tied = {name: _embedding_of(name, own) for name in own}
    changed: list[str] = []
    for key in list(tensors):
        place = name_in(module, key.removeprefix(PREFIX)).removesuffix(".weight")
        if not key.endswith(".weight") or place not in own or _is_named(tied[place], saved):
            continue
        if _is_the_same(tensors[key], own[place]):
            del tensors[key]
        elif tied[place] == place:
            changed.append(place)
    if tied.get(_HEAD, _HEAD) != _HEAD:
        _drop_rows_of_tied_head(files, tensors)
    values = dict(files.values)
    if changed:
        values["modules_to_save"] = [*saved, *changed]
        if any(tied[name] in changed for name in own if tied[name] != name):
            values["ensure_weight_tying"] = True  # one tensor, so the head goes along
        log.warning(
            "lorakit: %s: %s of the file differs from the model's and takes its place, as in PEFT",
            files.path,
            " and ".join(changed),
        )
    return files._replace(values=values, tensors=tensors)


def _embedding_of(name: str, own: Mapping[str, nn.Module]) -> str:
    """Return the embedding that a head is tied to; the name itself of anything else."""
    weight = original(own[name])._parameters.get("weight")
    if weight is None:
        return name
    embeddings = (other for other, each in own.items() if is_embedding(each))
    same = (e for e in embeddings if original(own[e])._parameters.get("weight") is weight)
    return next(same, name)


def _without_second_names(files: AdapterFiles) -> dict[str, LazyTensor]:
    """Return the tensors without those that PEFT saves beside a module that is trained whole.

    Raises LorakitError if the two names of a trained weight have different values.
    """
    found = {key: t for key, t in files.tensors.items() if ".original_module." not in key}
    for key in [key for key in found if ".modules_to_save." in key]:
        second, first = found.pop(key), key.replace(".modules_to_save.", ".")
        if first in found and not torch.equal(found[first].read(), second.read()):
            raise LorakitError(
                f"{files.path}: {key} differs from {first}, which is the same weight"
            )
        found.setdefault(first, second)
    return {
        key.replace(".token_adapter.base_layer.", ".base_layer."): t for key, t in found.items()
    }


def _drop_rows_of_tied_head(files: AdapterFiles, tensors: dict[str, LazyTensor]) -> None:
    """Take the head's trained rows away, which PEFT saves beside the embedding's.

    Raises LorakitError if they differ.
    """
    own = {key: key.removeprefix(PREFIX) for key in tensors if key.endswith(_ROWS)}
    head = next((key for key, name in own.items() if name.startswith(_HEAD)), None)
    embedding = next((key for key, name in own.items() if not name.startswith(_HEAD)), None)
    if head is None or embedding is None:
        return
    if not torch.equal(tensors[head].read(), tensors[embedding].read()):
        raise LorakitError(
            f"{files.path}: {head} differs from {embedding}, and in this model they are tied"
        )
    del tensors[head]


def _is_named(place: str, saved: list[str]) -> bool:
    """Return whether an entry of modules_to_save means a module, by PEFT's rule: any end of it."""
    return any(place.endswith(entry) for entry in saved)


def _is_the_same(tensor: LazyTensor, module: nn.Module) -> bool:
    """Return whether a weight in a file is the module's own; a packed one is taken to be."""
    own = original(module)._parameters.get("weight")
    if own is None or not own.is_floating_point():
        return True
    return tensor.shape == tuple(own.shape) and torch.equal(tensor.read().to(own), own)


# ---- more tokens than the model has ----


def _grow(model: Decoder, files: AdapterFiles, tensors: Mapping[str, LazyTensor]) -> None:
    """Give `model` rows for the tokens that the adapter has beyond its own."""
    size, wanted = model.config.vocab_size, _tokens_of(model, files)
    if wanted <= size:
        return
    if adapter_names(model):
        raise LorakitError(
            f"{files.path}: the adapter has {wanted} tokens and the model {size}: detach the "
            "adapters that it has, or call resize_embeddings before the first one"
        )
    log.warning(
        "lorakit: %s: the adapter has %d tokens and the model %d; the model gets rows for them",
        files.path,
        wanted,
        size,
    )
    rows = {
        place: _rows_of(model, files, tensors, place, size, wanted) for place in (_EMBEDDING, _HEAD)
    }
    add_rows(model, wanted - size, rows[_EMBEDDING], rows[_HEAD])


def _tokens_of(model: Decoder, files: AdapterFiles) -> int:
    """Return how many tokens an adapter is for, as far as its files show it."""
    H = model.config.hidden_size
    found = [0]
    for key, tensor in files.tensors.items():
        place, ending = _split(model, key)
        if ending in _BY_ROWS and len(tensor.shape) == 2 and tensor.shape[1] == H:
            found.append(tensor.shape[0])
        if ending == _BY_COLUMNS and len(tensor.shape) == 2:
            found.append(tensor.shape[1])
        if place == _HEAD and ending == "lora_B.weight":
            found.append(tensor.shape[0])
    return max(*found, _end_of_trained_tokens(model.config.vocab_size, files.values))


def _end_of_trained_tokens(size: int, values: Mapping[str, Any]) -> int:
    """Return the end of the trained tokens, if these are all that the model lacks; else 0.

    With a gap between them the file would not hold every new row.
    """
    wanted = values.get("trainable_token_indices")
    each = wanted.values() if isinstance(wanted, dict) else [wanted]
    new = {i for ids in each if isinstance(ids, list) for i in ids if type(i) is int and i >= size}
    return size + len(new) if new == set(range(size, size + len(new))) else 0


def _split(model: Decoder, key: str) -> tuple[str, str]:
    """Return embedding or head, and the rest of a tensor's key; two empty texts for others."""
    name = name_in(model, key.removeprefix(PREFIX))
    for place in (_EMBEDDING, _HEAD):
        if name.startswith(f"{place}."):
            return place, name.removeprefix(f"{place}.")
    return "", ""


def _rows_of(
    model: Decoder,
    files: AdapterFiles,
    tensors: Mapping[str, LazyTensor],
    place: str,
    start: int,
    end: int,
) -> Tensor | None:
    """Return the rows [end - start, H] of new tokens that the file has for embedding or head."""
    for endings in (_UNTRAINED, ("weight",)):
        for key, tensor in (*files.tensors.items(), *tensors.items()):
            found, ending = _split(model, key)
            if found == place and ending in endings and tensor.shape[0] == end:
                return tensor.read()[start:]
    return None
