"""Adapters of mlx_lm, read as PEFT's.

    adapter_config.json      fine_tune_type "lora", "dora" or "full", and lora_parameters with rank,
                             scale and dropout
    adapters.safetensors     <layer>.lora_a [in, r], <layer>.lora_b [r, out], and <layer>.m [out]
                             for DoRA

mlx_lm computes y = W x + scale (x a) b. So PEFT's A is a^T, its B is b^T, and its lora_alpha is
scale times r. On an embedding, where a is [V, r], they are lora_embedding_A and lora_embedding_B.

The experts of a layer lie in one module, <block>.switch_mlp.gate_proj and so on, with lora_a
[E, r, in] and lora_b [E, out, r], which are A and B of each expert already. In gpt-oss it is
<block>.experts.gate_proj, in Gemma 4 <layer>.experts.switch_glu.gate_proj.

Source: tuner/lora.py, tuner/dora.py and tuner/utils.py of mlx-lm 0.32.2.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapters.peft_files.layout import CONFIG_FILE, PREFIX, AdapterFiles
from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor, open_safetensors

WEIGHTS_OF_MLX = "adapters.safetensors"
_LARGEST = 1e30  # of scale; a number in JSON may have any number of digits
_EXPERTS = re.compile(r"(.+?)\.(?:switch_mlp|experts|experts\.switch_glu)\.([a-z]+_proj)")
MIXTRAL_KINDS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def is_mlx(values: Mapping[str, Any]) -> bool:
    """Return whether an adapter_config.json is one of mlx_lm."""
    return "peft_type" not in values and ("lora_parameters" in values or "fine_tune_type" in values)


def open_mlx(path: Path, values: Mapping[str, Any]) -> AdapterFiles:
    """Open an adapter of mlx_lm; the values of its tensors stay on disk.

    Args:
        path: Its directory.
        values: Its adapter_config.json.

    Returns:
        The same adapter with the config and the keys of PEFT.

    Raises:
        LorakitError: A file is missing or damaged, whole weights were trained, or a tensor belongs
            to no adapter.
    """
    if values.get("fine_tune_type") == "full":
        raise LorakitError(
            f"{path}: fine_tune_type is full: these are whole weights of MLX and no adapter; "
            "`mlx_lm.fuse --dequantize` makes a model of them, which load_model reads"
        )
    if not (path / WEIGHTS_OF_MLX).exists() and (path / "adapters.npz").exists():
        raise LorakitError(
            f"{path}: adapters.npz is of an old mlx_lm: write it as {WEIGHTS_OF_MLX}, with mx.load "
            "and mx.save_safetensors"
        )
    r, scale, dropout = _parameters(path, values)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in open_safetensors(path / WEIGHTS_OF_MLX).items():
        tensors |= dict(_renamed(path, name, tensor))
    suffixes = (".lora_A.weight", ".lora_embedding_A")
    places = {
        key.removesuffix(end): None for key in tensors for end in suffixes if key.endswith(end)
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": values.get("model"),
        "r": r,
        "lora_alpha": scale * r,
        "lora_dropout": dropout,
        "use_dora": any(key.endswith(".lora_magnitude_vector") for key in tensors),
        "target_modules": [place.removeprefix(PREFIX) for place in places],
    }
    return AdapterFiles(path, config, tensors, "MLX")


def _parameters(path: Path, values: Mapping[str, Any]) -> tuple[int, float, float]:
    """Return rank, scale and dropout."""
    where = f"{path / CONFIG_FILE}: lora_parameters"
    found = values.get("lora_parameters")
    if not isinstance(found, Mapping):
        raise LorakitError(f"{where} is missing, which holds rank and scale")
    r: Any = found.get("rank")
    scale: Any = found.get("scale")
    dropout: Any = found.get("dropout", 0.0)
    if type(r) is not int or not 0 < r < 1 << 31:
        raise LorakitError(f"{where}: rank must be a positive whole number, not {r!r}")
    for name, number in {"scale": scale, "dropout": dropout}.items():
        if type(number) not in (int, float) or not abs(number) <= _LARGEST:
            raise LorakitError(f"{where}: {name} must be a number, not {number!r}")
    if "alpha" in found and "lora_layers" in values:
        raise LorakitError(
            f"{where} is of an mlx_lm before 0.19, some versions of which multiplied scale by "
            "alpha / rank: write the whole factor of the update into scale, and leave alpha out"
        )
    return r, scale, dropout


def _renamed(path: Path, name: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the tensors that PEFT has for one of mlx_lm's, by their keys."""
    layer, _, part = name.rpartition(".")
    embedding = layer.endswith("embed_tokens")
    ends = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}
    if embedding:
        ends = {"lora_a": ".lora_embedding_A", "lora_b": ".lora_embedding_B"}
    elif part == "m" and len(tensor.shape) == 1:
        yield f"{PREFIX}{layer}.lora_magnitude_vector", tensor
        return
    if part not in ends:
        raise LorakitError(f"{path}: tensor {name} is none of lora_a, lora_b and m of a layer")
    if experts := _EXPERTS.fullmatch(layer):
        yield from _of_experts(path, experts, ends[part], tensor)
    elif len(tensor.shape) == 2:
        yield f"{PREFIX}{layer}{ends[part]}", _transposed(tensor)
    else:
        raise LorakitError(f"{path}: tensor {name} is {tensor.shape}, not of two dimensions")


def _transposed(tensor: LazyTensor) -> LazyTensor:
    rows, columns = tensor.shape
    return LazyTensor((columns, rows), lambda: tensor.read().t())


def _of_experts(
    path: Path, layer: re.Match[str], end: str, tensor: LazyTensor
) -> Iterator[tuple[str, LazyTensor]]:
    """Yield A or B of each expert, [E, r, in] or [E, out, r] in the file."""
    if len(tensor.shape) != 3:
        raise LorakitError(f"{path}: {layer[0]} is {tensor.shape}, not of (experts, rows, columns)")
    block, kind = layer.groups()
    leaf = expert_leaf(block, kind)
    for i in range(tensor.shape[0]):

        def read(number: int = i) -> Tensor:
            return tensor.read()[number]

        yield f"{PREFIX}{block}.experts.{i}.{leaf}{end}", LazyTensor(tensor.shape[1:], read)


def expert_leaf(block: str, kind: str) -> str:
    """Return the published name of an expert's layer that mlx_lm calls `kind`."""
    return MIXTRAL_KINDS.get(kind, kind) if block.endswith(".block_sparse_moe") else kind
