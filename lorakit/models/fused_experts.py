"""Experts that files hold as two tensors a layer, read as the layers of each expert, and written.

    experts.gate_up_proj [E, 2 I, H]    experts.N.gate_proj.weight, experts.N.up_proj.weight [I, H]
    experts.down_proj [E, H, I]         experts.N.down_proj.weight [H, I]

transformers holds the experts so in memory, and the files of Qwen 3.5 do. A part is read from the
file when it is asked for, so that memory holds one expert at a time. Of some families (Gemma 4)
transformers reads no other form, so that they are written in this one.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor
from lorakit.models.bitsandbytes import LazyWeight
from lorakit.models.config import ModelConfig


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
    _, gate, up, down = config.moe_names
    layers = {".experts.gate_up_proj": (gate, up), ".experts.down_proj": (down,)}
    found: dict[str, LazyWeight] = {}
    for name, tensor in tensors.items():
        ending = next((end for end in layers if name.endswith(end)), None)
        if ending is None or not isinstance(tensor, LazyTensor):
            found[name] = tensor
            continue
        names, prefix = layers[ending], f"{name.removesuffix(ending)}.experts"
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        shape = (hidden, inner) if names == (down,) else (inner, hidden)
        whole = (config.num_experts, len(names) * shape[0], shape[1])
        if tensor.shape != whole:
            raise LorakitError(
                f"{where}: tensor {name} is {tensor.shape}, the config asks for {whole}"
            )
        for expert in range(config.num_experts):
            for part, layer in enumerate(names):
                read = partial(_read, tensor, expert, part * shape[0], shape[0])
                found[f"{prefix}.{expert}.{layer}.weight"] = LazyTensor(shape, read)
    return found


def _read(tensor: LazyTensor, expert: int, start: int, rows: int) -> Tensor:
    """Return so many rows of one expert, from the row `start` on."""
    values = tensor.read()[expert] if tensor.read_at is None else tensor.read_at(expert)
    return values[start : start + rows]


def fused_parts(names: Iterable[str], config: ModelConfig) -> dict[str, list[list[str]]]:
    """Return which tensors of single experts make up each fused one.

    Args:
        names: The names of all tensors of a model.
        config: What the model is.

    Returns:
        For each fused tensor the names of its parts, a list for each expert; they lie one under
        the other in it. Experts that are packed stay apart, and are not in it.
    """
    _, gate, up, down = config.moe_names
    kinds = {"gate_up_proj": (gate, up), "down_proj": (down,)}
    known = set(names)
    found: dict[str, list[list[str]]] = {}
    for name in known:
        first = re.fullmatch(rf"(.*\.experts)\.0\.({gate}|{down})\.weight", name)
        if first is None or any(f"{name[:-6]}{end}" in known for end in ("SCB", "weight.absmax")):
            continue
        kind = "down_proj" if first[2] == down else "gate_up_proj"
        found[f"{first[1]}.{kind}"] = [
            [f"{first[1]}.{expert}.{part}.weight" for part in kinds[kind]]
            for expert in range(config.num_experts)
        ]
    return found
