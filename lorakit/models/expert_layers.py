"""How a mixture's experts look to the kernel that computes all of them together.

`expert_layers` finds what the experts' layers store and which low-rank updates they carry. It finds
nothing where a layer has to be called as it is, is trained whole, drops a part of its input, or
computes more than W x + s B A x and a frozen bias. Then each expert runs by itself.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.hooks import has_hooks, has_own_forward
from lorakit.models.packed_layers import PackedLinear
from lorakit.models.shards import is_sharded


class _Found(NamedTuple):
    """What a layer of one expert computes with."""

    stored: Tensor | kernels.Packed
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    bias: Tensor | None


def expert_layers(
    experts: Iterable[nn.Module], names: Sequence[str]
) -> list[kernels.ExpertLayers] | None:
    """Return the layers of all experts as the kernel takes them, one entry for each of `names`.

    Return None if one of them does not fit, or if the experts differ in more than values.
    """
    experts = list(experts)
    if any(has_hooks(expert) or has_own_forward(expert) for expert in experts):
        return None
    made = []
    for name in names:
        found = [_parts(expert.get_submodule(name)) for expert in experts]
        layers = _together([parts for parts in found if parts is not None])
        if None in found or layers is None:
            return None
        made.append(layers)
    return made


def _parts(layer: nn.Module) -> _Found | None:
    """Return what a layer computes with; A and B are None if it carries no adapter."""
    if has_hooks(layer) or has_own_forward(layer):
        return None
    if isinstance(layer, AdaptedLayer):
        alone = layer.only_module()
        if alone is not None:
            return _parts(alone)
        update = layer.fusible_update()
        if update is None or update.dropout or update.magnitude is not None:
            return None
        stored = update.base.stored
        if _trained(update.bias) or isinstance(stored, kernels.Float8Weight):
            return None
        return _Found(stored, update.lora_A, update.lora_B, update.scaling, update.bias)
    weight = layer._parameters.get("weight")
    if weight is None or is_sharded(weight):  # merged, and gathered where it is called
        return None
    if isinstance(layer, PackedLinear):
        found = _Found(layer.quantized, None, None, 1.0, layer.bias)
        return None if _trained(layer.bias) else found
    if type(layer) is not nn.Linear or _trained(weight) or _trained(layer.bias):
        return None
    return _Found(weight.detach(), None, None, 1.0, layer.bias)


def _trained(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad and torch.is_grad_enabled()


def _together(found: Sequence[_Found]) -> kernels.ExpertLayers | None:
    """Return the layers of all experts, if all of them carry adapters of one scaling, or none."""
    stored, scalings = [each.stored for each in found], {each.scaling for each in found}
    A = [each.lora_A for each in found if each.lora_A is not None]
    B = [each.lora_B for each in found if each.lora_B is not None]
    bias = [each.bias.detach() for each in found if each.bias is not None]
    if len(scalings) != 1 or any(len(each) not in (0, len(found)) for each in (A, bias)):
        return None
    return kernels.ExpertLayers(stored, A, B, scalings.pop(), bias)
