"""Linear attention in GGUF files, whose values differ from the published ones in four ways.

- A decay is stored as the factor that it is, -exp(A_log).
- The weight of the convolution has two dimensions, [C, K] for the published [C, 1, K].
- Qwen 3.5's heads of values are tiled over those of keys; the published ones are grouped by them:

      file        k0v0 k1v0 k0v1 k1v1        published        k0v0 k0v1 k1v0 k1v1

  So the rows of what makes values change places, and the columns of what takes them.
- Qwen3-Next publishes queries, keys, values and gates as one layer, grouped by the heads of keys.
  Files hold it as two: queries, keys and values one behind the other, and the gates.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.files.safetensors import LazyTensor
from lorakit.models.config import ModelConfig

LINEAR = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
"""GGUF's names of a layer's tensors -> Hugging Face's."""
LINEAR_WHOLE = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
"""Those whose names end otherwise."""
LINEAR_KEYS = {
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "linear_key_head_dim": "ssm.state_size",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "full_attention_interval": "full_attention_interval",
}
"""Keys of config.json -> keys of the file."""
MOVES_COLUMNS = ".linear_attn.out_proj"
"""The layer whose columns change places, not its rows."""
_WHOLE, _PARTS = "linear_attn.in_proj_qkvz.weight", ("in_proj_qkv", "in_proj_z")


def linear_change(
    published: str, config: ModelConfig, stores: bool
) -> Callable[[Tensor], Tensor] | None:
    """Return what turns a stored tensor of linear attention into the published one.

    Args:
        published: The published name of the tensor.
        config: The model's configuration.
        stores: Whether the published tensor is turned into the stored one instead.

    Returns:
        The function, or None if the two are the same or the tensor is of something else.
    """
    _, found, name = published.partition(".linear_attn.")
    if not found or not any(config.linear_layers):  # a damaged file may have its tensors alone
        return None
    keys, dim = config.linear_num_key_heads, config.linear_value_head_dim
    heads = (keys, config.linear_num_value_heads // keys)
    tiled = not config.fused_qkvz and min(heads) > 1
    move = partial(_moved, heads=heads if stores else heads[::-1])
    before = 2 * keys * config.linear_key_head_dim  # rows of queries and keys
    if name == "A_log":
        return partial(_decay, stores=stores, move=move if tiled else None)
    if not tiled:
        return None
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "dt_bias": partial(move, width=1),
        "in_proj_a.weight": partial(move, width=1),
        "in_proj_b.weight": partial(move, width=1),
        "in_proj_z.weight": partial(move, width=dim),
        "in_proj_qkv.weight": partial(move, width=dim, before=before),
        "conv1d.weight": partial(move, width=dim, before=before),
        "out_proj.weight": lambda weight: move(weight.T, width=dim).T.contiguous(),
    }
    return changes.get(name)


def _moved(weight: Tensor, heads: tuple[int, int], width: int, before: int = 0) -> Tensor:
    """Bring rows [before + a b width, ...] from the order (a, b, width) to (b, a, width)."""
    kept, rows = weight[:before], weight[before:]
    moved = rows.reshape(*heads, width, *rows.shape[1:]).transpose(0, 1)
    return torch.cat([kept, moved.reshape(rows.shape)])


def _decay(weight: Tensor, stores: bool, move: Callable[..., Tensor] | None) -> Tensor:
    """Return -exp(A_log) of the published A_log, or A_log of that."""
    if not stores and not (weight < 0).all():
        raise LorakitError("a GGUF file holds decays (ssm_a) that are not below 0")
    values = -weight.float().exp() if stores else (-weight).log()
    return values if move is None else move(values, width=1)


def joined(tensors: Mapping[str, LazyTensor], config: ModelConfig) -> dict[str, LazyTensor]:
    """Return tensors with the two parts of each of Qwen3-Next's input layers as one."""
    if not config.fused_qkvz:
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        if ".linear_attn.in_proj_z." in name:  # comes with in_proj_qkv
            continue
        layer, is_part, _ = name.rpartition(".linear_attn.in_proj_qkv.")
        gates = tensors.get(f"{layer}.linear_attn.in_proj_z.weight")
        if is_part and gates is not None:
            rows = tensor.shape[0] + gates.shape[0]
            read = partial(_joined, tensor, gates, config)
            found[f"{layer}.{_WHOLE}"] = LazyTensor((rows, *tensor.shape[1:]), read)
        else:
            found[name] = tensor
    return found


def _joined(qkv: LazyTensor, gates: LazyTensor, config: ModelConfig) -> Tensor:
    """Return in_proj_qkvz [nk (2 dk + 2 r dv), H], grouped by the heads of keys."""
    keys, values, heads = _widths(config)
    rows = qkv.read()
    if rows.shape[0] != 2 * keys + values or gates.shape[0] != values:
        raise LorakitError(
            f"a GGUF file holds input layers of linear attention of {rows.shape[0]} and "
            f"{gates.shape[0]} rows, not {2 * keys + values} and {values}"
        )
    parts = [*rows.split([keys, keys, values]), gates.read()]
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)


def parted(tensors: Mapping[str, LazyTensor], config: ModelConfig) -> dict[str, LazyTensor]:
    """Return tensors with each of Qwen3-Next's input layers as the two that files hold."""
    found = {}
    keys, values, _ = _widths(config)
    for name, tensor in tensors.items():
        if not name.endswith(_WHOLE):
            found[name] = tensor
            continue
        for part, rows in zip(_PARTS, (2 * keys + values, values), strict=True):
            read = partial(_parted, tensor, config, part)
            shape = (rows, *tensor.shape[1:])
            found[name.replace("in_proj_qkvz", part)] = LazyTensor(shape, read)
    return found


def _parted(tensor: LazyTensor, config: ModelConfig, part: str) -> Tensor:
    """Return the rows of in_proj_qkvz that belong to in_proj_qkv, or to in_proj_z."""
    keys, values, heads = _widths(config)
    inner = [each // heads for each in (keys, keys, values, values)]
    *qkv, gates = (
        each.flatten(0, 1) for each in tensor.read().unflatten(0, (heads, -1)).split(inner, dim=1)
    )
    return gates.contiguous() if part == "in_proj_z" else torch.cat(qkv)


def _widths(config: ModelConfig) -> tuple[int, int, int]:
    """Return the rows of the keys, those of the values, and the number of heads of keys."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return keys, values, config.linear_num_key_heads
