"""Experts that files hold as a few tensors a layer, read as the layers of each expert, and written.

    experts.gate_up_proj [E, 2 I, H]    experts.N.gate_proj.weight, experts.N.up_proj.weight [I, H]
    experts.down_proj [E, H, I]         experts.N.down_proj.weight [H, I]

transformers holds the experts so in memory, and the files of Qwen 3.5 do. gpt-oss holds transposed
matrices, [E, H, 2 I] and [E, I, H], in which columns of gate and up take turns, and biases:
gate_up_proj_bias [E, 2 I] and down_proj_bias [E, H]. Published files of Qwen3-VL-MoE hold
transposed matrices too, where all of gate stand first; files that transformers 5 wrote hold them as
above, and the shape tells which. A square one is not transposed, for transformers reads it so.

A part is read from the file when it is asked for, so that memory holds one expert at a time. Of
some families (Gemma 4, gpt-oss) transformers reads no other form, so that they are written in this
one.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor
from lorakit.models.bitsandbytes import LazyWeight
from lorakit.models.config import ModelConfig


class FusedTensor(NamedTuple):
    """A tensor that holds some parts of every expert of a layer."""

    parts: tuple[str, ...]
    """The names of its parts in an expert, such as "gate_proj.weight"."""
    shape: tuple[int, ...]
    """The shape of a part."""
    transposed: bool
    """Whether a matrix has its inputs as rows."""
    interleaved: bool
    """Whether the outputs of its parts take turns in it; else they lie one after another."""

    @property
    def expert_shape(self) -> tuple[int, ...]:
        """The shape of what it holds of one expert."""
        whole = (len(self.parts) * self.shape[0], *self.shape[1:])
        return whole[::-1] if self.transposed else whole

    @property
    def upright(self) -> "FusedTensor":
        """The form of a tensor that holds the same parts and is not transposed."""
        return self._replace(transposed=False)

    def part(self, values: Tensor, number: int) -> Tensor:
        """Return one part of what it holds of one expert."""
        rows = values.t() if self.transposed and values.dim() == 2 else values
        if self.interleaved:
            return rows[number :: len(self.parts)]
        return rows[number * self.shape[0] : (number + 1) * self.shape[0]]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what it holds of one expert, given the parts."""
        if self.interleaved:
            whole = torch.stack(tuple(parts), 1).flatten(0, 1)
        else:
            whole = torch.cat(tuple(parts))
        return whole.t() if self.transposed and whole.dim() == 2 else whole


def fused_tensors(config: ModelConfig) -> dict[str, FusedTensor]:
    """Return the fused tensors that a layer's experts may have, by their names after "experts."."""
    _, gate, up, down = config.moe_names
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    layers = {"gate_up_proj": ((gate, up), inner, hidden), "down_proj": ((down,), hidden, inner)}
    interleaved = config.experts_interleaved
    found = {}
    for name, (parts, rows, columns) in layers.items():
        square = len(parts) * rows == columns
        form = config.experts_transposed and (interleaved or not square), interleaved
        weights = tuple(f"{part}.weight" for part in parts)
        found[name] = FusedTensor(weights, (rows, columns), *form)
        if config.mlp_bias:
            biases = tuple(f"{part}.bias" for part in parts)
            found[f"{name}_bias"] = FusedTensor(biases, (rows,), *form)
    return found


def split_experts(
    tensors: Mapping[str, LazyWeight], config: ModelConfig, where: str
) -> dict[str, LazyWeight]:
    """Return the tensors of a model with those of fused experts in parts, one for each layer.

    Args:
        tensors: The tensors by the text model's own names, still on disk.
        config: What the model is.
        where: The files' place, for messages.

    Returns:
        The tensors in the same order; all that are no fused experts are as they were.

    Raises:
        LorakitError: If fused experts have another number or another shape than the config says.
    """
    known = fused_tensors(config)
    found: dict[str, LazyWeight] = {}
    for name, tensor in tensors.items():
        layer, _, ending = name.rpartition(".experts.")
        fused = known.get(ending) if layer else None
        if fused is None or not isinstance(tensor, LazyTensor):
            found[name] = tensor
            continue
        count = config.num_experts
        if not fused.interleaved and tensor.shape == (count, *fused.upright.expert_shape):
            fused = fused.upright
        whole = (count, *fused.expert_shape)
        if tensor.shape != whole:
            raise LorakitError(
                f"{where}: tensor {name} is {tensor.shape}, the config asks for {whole}"
            )
        for expert in range(count):
            for number, part in enumerate(fused.parts):
                read = partial(_read, tensor, fused, expert, number)
                found[f"{layer}.experts.{expert}.{part}"] = LazyTensor(fused.shape, read)
    return found


def _read(tensor: LazyTensor, fused: FusedTensor, expert: int, number: int) -> Tensor:
    """Return one part of one expert."""
    return fused.part(tensor.at(expert), number)


def fused_parts(
    names: Iterable[str], config: ModelConfig
) -> dict[str, tuple[FusedTensor, list[list[str]]]]:
    """Return which tensors of single experts make up each fused one.

    Args:
        names: The names of all tensors of a model.
        config: What the model is.

    Returns:
        For each fused tensor how it holds its parts, and their names, a list for each expert.
        Experts that are packed stay apart, and are not in it.
    """
    known = set(names)
    firsts = {match[1] for name in known if (match := re.match(r"(.*\.experts)\.0\.", name))}
    found = {}
    for experts in sorted(firsts):
        for name, fused in fused_tensors(config).items():
            layer = f"{experts}.0.{fused.parts[0].rpartition('.')[0]}"
            if f"{layer}.SCB" in known or f"{layer}.weight.absmax" in known:
                continue
            numbers = range(config.num_experts)
            parts = [[f"{experts}.{i}.{part}" for part in fused.parts] for i in numbers]
            found[f"{experts}.{name}"] = fused, parts
    return found
