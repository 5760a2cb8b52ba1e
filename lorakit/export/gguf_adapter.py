"""An adapter as a GGUF file, which llama.cpp and Ollama put on top of a model's.

    <weight>.lora_a    A [r, in], of experts [E, r, in], of the embedding [V, r]
    <weight>.lora_b    B [out, r], of experts [E, out, r]

llama.cpp computes W x + alpha / r B A x, with one alpha for the whole file and the r of the tensors
themselves; an alpha of 0 means a factor of 1. So with s the scaling of a layer,

    alpha = s r             if that is one number for all layers: nothing is rounded in fp32
    alpha = r of the first, B' = (s r / alpha) B otherwise

That holds rsLoRA and patterns of ranks and alphas exactly. The ranks of a block's experts are made
one with zeros, and an expert that is not adapted has zeros alone. In `llama` files the rows of B
are in another order in q and k, as those of W are (models/gguf_names.py).

Source of the format: llama.cpp's llama-adapter.cpp and llama-graph.cpp.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.adapters.peft_files.plain import PlainAdapter, PlainLayer, read_plain
from lorakit.config.errors import LorakitError, check
from lorakit.export.gguf import GgufFile, checked_file, count_formats
from lorakit.files.gguf import NewTensor, write_gguf
from lorakit.files.hub import name_of
from lorakit.models.gguf_linear import MOVES_COLUMNS
from lorakit.models.gguf_names import Dialect, dialect_of, storage, stored_name

_DTYPES = {"float16": ("F16", 1, torch.float16), "float32": ("F32", 0, torch.float32)}


@torch.no_grad()
def export_gguf_adapter(
    adapter: str | Path,
    file: str | Path,
    *,
    base_model: str | Path | None = None,
    dtype: str = "float16",
    name: str | None = None,
) -> GgufFile:
    """Write a LoRA adapter as a GGUF file, for llama.cpp's --lora or Ollama's ADAPTER.

    The model's own GGUF file, of any quantization, stays as it is.

    Args:
        adapter: A LoRA adapter of any kind that `load_adapter` reads, by its Hub id too.
        file: The file to write. Its directory is made if it is missing.
        base_model: A directory, .gguf file or Hub id of the model that it was trained on. None
            takes the one that the adapter names.
        dtype: float16 or float32.
        name: What the file calls the adapter. None takes the name of its directory.

    Returns:
        What was written, which prints as a table.

    Raises:
        LorakitError: The file has no place for something of the adapter (DoRA, biases,
            modules_to_save, trained tokens, the embedding of a tied model), it does not fit the
            model, a file cannot be read, a value is not finite, or an argument is wrong.
        OSError: The disk is full. A file that was there before is as it was.
    """
    check(dtype in _DTYPES, f"dtype must be float16 or float32, not {dtype!r}")
    file = checked_file(file)
    plain = read_plain(adapter, base_model)
    path = plain.stored.path
    for place, layer in plain.layers.items():
        if layer.magnitude is not None:
            raise LorakitError(
                f"{path}: {place} is of DoRA, which a GGUF adapter has no place for: merge it "
                "(lorakit export with the adapter), or approximate it (lorakit adapter convert)"
            )
    arch, dialect = dialect_of(plain.base.config)
    kind, file_type, _ = _DTYPES[dtype]
    groups = _groups(plain, dialect)
    alpha = _alpha(groups)
    tensors = [
        tensor
        for stored, members in groups.items()
        for tensor in _tensors(plain, stored, members, alpha, dtype)
    ]
    metadata = {
        "general.architecture": arch,
        "general.type": "adapter",
        "general.name": name or name_of(adapter),
        "general.file_type": file_type,
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    write_gguf(file, metadata, tensors)
    return GgufFile(file, kind.lower(), file.stat().st_size, count_formats(tensors), {})


_Members = dict[int | None, PlainLayer]  # the layers of one stored weight, by expert


def _groups(plain: PlainAdapter, dialect: Dialect) -> dict[str, _Members]:
    """Return the layers of each weight of the file, with A and B in the file's order."""
    groups: dict[str, _Members] = {}
    for place, layer in plain.layers.items():
        published = f"{place}.weight"
        stored, expert = stored_name(published, dialect)
        if place.endswith(".in_proj_qkvz"):
            raise LorakitError(
                f"{plain.stored.path}: {place} is two layers in GGUF files, so that an adapter of "
                "it has no place there: merge it (lorakit export with the adapter)"
            )
        if _computed_without(stored, dialect):
            raise LorakitError(
                f"{plain.stored.path}: {place}: llama.cpp leaves an adapter out there, or scales "
                "it otherwise: merge it (lorakit export with the adapter)"
            )
        change = storage(published, dialect, plain.base.config)
        if change is not None and place.endswith(MOVES_COLUMNS):
            layer = layer._replace(a=change(layer.a))
        elif change is not None:
            layer = layer._replace(b=change(layer.b))
        groups.setdefault(stored, {})[expert] = layer
    return groups


def _computed_without(stored: str, dialect: Dialect) -> bool:
    """Return whether llama.cpp does not add an adapter of a weight as the model does.

    In Gemma 4 the input of the second embedding has none. An expert's output is multiplied by the
    factor of the expert, and what an adapter adds to it is not.
    """
    scaled = "ffn_down_exps.scale" in dialect.whole and "ffn_down_exps" in stored
    return scaled or stored.startswith("per_layer_model_proj.")


def _rank(members: _Members) -> int:
    """Return the rank of the tensors of one stored weight."""
    return max(len(layer.a) for layer in members.values())


def _alpha(groups: dict[str, _Members]) -> float:
    """Return the alpha of the file."""
    shared = {
        layer.scaling * _rank(members) for members in groups.values() for layer in members.values()
    }
    alpha = shared.pop()
    return alpha if alpha and not shared else float(_rank(next(iter(groups.values()))))


def _tensors(
    plain: PlainAdapter, stored: str, members: _Members, alpha: float, dtype: str
) -> list[NewTensor]:
    """Return A and B of one stored weight, each fp32 until it is written."""
    r = _rank(members)
    first = next(iter(members.values()))
    experts = 1 if None in members else plain.base.config.num_experts
    a, b = torch.zeros(experts, r, first.a.shape[1]), torch.zeros(experts, first.b.shape[0], r)
    for expert, layer in members.items():
        factor = layer.scaling * r / alpha
        a[expert or 0, : len(layer.a)] = layer.a
        b[expert or 0, :, : len(layer.a)] = layer.b if factor == 1 else layer.b.double() * factor
    if None in members:
        a, b = a[0], b[0]
    if first.embedding:
        a = a.t()
    found = []
    for end, tensor in ("lora_a", a), ("lora_b", b):
        rows = _bytes(plain.stored.path, stored, tensor, dtype)
        kind = _DTYPES[dtype][0]
        found.append(NewTensor(f"{stored}.{end}", tuple(tensor.shape), kind, partial(_same, rows)))
    return found


def _bytes(path: Path, stored: str, tensor: Tensor, dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the bytes of a tensor in the dtype of the file, uint8 [rows, bytes of a row]."""
    rows = tensor.reshape(-1, tensor.shape[-1]).to(_DTYPES[dtype][2]).contiguous()
    if not rows.isfinite().all():
        raise LorakitError(f"{path}: {stored} holds values beyond {dtype}; choose float32")
    return rows.view(torch.uint8).numpy()


def _same(rows: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    return rows
