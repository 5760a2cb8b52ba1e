"""Adapters of llama.cpp, read as PEFT's.

A GGUF file whose general.type is "adapter" and whose adapter.type is "lora". It has one number,
adapter.lora.alpha, and two tensors for each adapted weight:

    blk.3.attn_q.weight.lora_a          [r, in], of experts [E, r, in], of the embedding [V, r]
    blk.3.attn_q.weight.lora_b          [out, r], of experts [E, out, r]

llama.cpp computes W x + s B A x with s = alpha / r, where r is the rank of the tensors themselves;
an alpha of zero means s = 1. In `llama` files the rows of B are interleaved in q and k as those of
W are (models/gguf.py), so the number of heads must be known to read them.

Source: llama.cpp's llama-adapter.cpp, llama-graph.cpp and convert_lora_to_gguf.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lorakit.adapters.peft_files.layout import PREFIX, AdapterFiles
from lorakit.config.errors import LorakitError
from lorakit.config.patterns import each_alone
from lorakit.files.gguf import Header, TensorInfo, data_length, fp32_reader, read_header
from lorakit.files.safetensors import LazyTensor
from lorakit.models.config import ModelConfig
from lorakit.models.gguf import adapted_weight

_A, _B = ".lora_a", ".lora_b"


class _Weight(NamedTuple):
    """One adapted weight of the file."""

    name: str  # as the file has it
    published: str  # {} stands for the number of each expert
    restore: Callable[[Tensor], Tensor] | None  # of the rows of B
    r: int


def open_gguf(path: Path, config: ModelConfig | None) -> AdapterFiles:
    """Open an adapter of llama.cpp; the values of its tensors stay on disk.

    Args:
        path: The .gguf file.
        config: The model that it is for. None leaves the rows of B as they are in the file, which
            changes no norm.

    Returns:
        The same adapter with the config and the keys of PEFT, whose tensors read as fp32.

    Raises:
        LorakitError: The file is damaged or no LoRA, or a tensor belongs to no weight of its
            architecture.
    """
    header = read_header(path)
    alpha = _alpha(path, header.metadata)
    weights = [
        _weight(path, header, name.removesuffix(_B), config)
        for name in header.tensors
        if name.endswith(_B)
    ]
    tensors: dict[str, LazyTensor] = {}
    ranks: dict[str, int] = {}
    for weight in weights:
        for place, a, b in _pairs(path, header, weight):
            embedding = weight.published == "model.embed_tokens.weight"
            ends = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
            tensors |= {f"{PREFIX}{place}.lora_{ends[0]}": a, f"{PREFIX}{place}.lora_{ends[1]}": b}
            ranks[place] = weight.r
    used = {weight.name + end for weight in weights for end in (_A, _B)}
    if other := [name for name in header.tensors if name not in used]:
        raise LorakitError(f"{path}: tensor {other[0]} is no pair of lora_a and lora_b")
    if not ranks:
        raise LorakitError(f"{path}: no layer is adapted")
    return AdapterFiles(path, _values(ranks, alpha), tensors, "llama.cpp")


def _alpha(path: Path, metadata: Mapping[str, Any]) -> float:
    """Return the alpha of a file. Raises LorakitError unless it is an adapter, and LoRA."""
    kind, method = metadata.get("general.type"), metadata.get("adapter.type")
    if kind != "adapter":
        raise LorakitError(f"{path} is a model and no adapter (general.type is {kind!r})")
    if method != "lora":
        raise LorakitError(f"{path}: adapter.type is {method!r}; lorakit has 'lora'")
    if metadata.get("adapter.alora.invocation_tokens"):
        raise LorakitError(
            f"{path}: adapter.alora.invocation_tokens is not supported (aLoRA, which tokens of the "
            "input switch on)"
        )
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise LorakitError(f"{path}: adapter.lora.alpha must be a number, not {alpha!r}")
    return float(alpha)


def _values(ranks: Mapping[str, int], alpha: float) -> dict[str, Any]:
    """Return the config of an adapter with these ranks; an alpha of 0 makes each scaling 1."""
    places = list(ranks)
    r = next(iter(ranks.values()))
    others = {place: rank for place, rank in ranks.items() if rank != r}
    pattern = each_alone(ranks, places) if others else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": alpha or r,
        "rank_pattern": pattern,
        "alpha_pattern": {} if alpha else pattern,
        "target_modules": places,
    }


def _weight(path: Path, header: Header, name: str, config: ModelConfig | None) -> _Weight:
    """Return the weight called `name`. Raises LorakitError unless a and b are of one rank."""
    published, restore = adapted_weight(path, header, name, config)
    a, b = header.tensors.get(name + _A), header.tensors[name + _B]
    if a is None:
        raise LorakitError(f"{path}: tensor {name}{_A} is missing")
    sides = 3 if "{}" in published else 2
    by_row = published == "model.embed_tokens.weight"  # there a is [V, r]
    fits = len(a.shape) == len(b.shape) == sides and min(*a.shape, *b.shape) > 0
    if not fits or b.shape[-1] != a.shape[-1 if by_row else -2] or a.shape[:-2] != b.shape[:-2]:
        raise LorakitError(f"{path}: {name}: lora_a is {a.shape} and lora_b {b.shape}: no one rank")
    return _Weight(name, published, restore, b.shape[-1])


def _pairs(
    path: Path, header: Header, weight: _Weight
) -> Iterator[tuple[str, LazyTensor, LazyTensor]]:
    """Yield A and B of the layer that has this weight, or of each expert's, with its name."""
    a, b = (header.tensors[weight.name + end] for end in (_A, _B))
    lengths = [data_length(path, weight.name, info) for info in (a, b)]
    place = weight.published.removesuffix(".weight")
    if "{}" not in place:
        by_row = place == "model.embed_tokens"
        first = _tensor(path, a, lengths[0], Tensor.t if by_row else None)
        yield place, first, _tensor(path, b, lengths[1], weight.restore)
        return
    for i in range(a.shape[0]):
        parts = [
            _tensor(path, _expert(info, length, i), length // a.shape[0])
            for info, length in zip((a, b), lengths, strict=True)
        ]
        yield place.replace("{}", str(i)), parts[0], parts[1]


def _expert(info: TensorInfo, length: int, number: int) -> TensorInfo:
    """Return one expert's part of a tensor of all, whose data takes `length` bytes."""
    step = length // info.shape[0]
    return info._replace(shape=info.shape[1:], offset=info.offset + number * step)


def _tensor(
    path: Path, info: TensorInfo, length: int, change: Callable[[Tensor], Tensor] | None = None
) -> LazyTensor:
    """Return a tensor of the file that reads as fp32, changed by `change`."""
    read = fp32_reader(path, info, length)
    if change is None:
        return LazyTensor(info.shape, read)
    shape = info.shape[::-1] if change is Tensor.t else info.shape
    return LazyTensor(shape, partial(_changed, read, change))


def _changed(read: Callable[[], Tensor], change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(read())
