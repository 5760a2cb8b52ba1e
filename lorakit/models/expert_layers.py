"""How a mixture's experts look to the kernel that computes all of them together.

`expert_layers` finds what the experts' layers store and which low-rank updates they carry. It finds
nothing where a layer has to be called as it is, is trained whole, drops a part of its input, or
computes more than W x + s B A x. Then each expert runs by itself.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorakit import kernels
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.hooks import has_hooks, has_own_forward
from lorakit.models.packed_layers import PackedLinear

_Found = tuple[Tensor | kernels.Packed, Tensor | None, Tensor | None, float]


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
    """Return W, A, B and s of a layer; A and B are None if it carries no adapter."""
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
        if update.bias is not None or isinstance(stored, kernels.Float8Weight):
            return None
        return stored, update.lora_A, update.lora_B, update.scaling
    if isinstance(layer, PackedLinear):
        return None if layer.bias is not None else (layer.quantized, None, None, 1.0)
    if type(layer) is not nn.Linear or layer.bias is not None or "weight" not in layer._parameters:
        return None
    trained = layer.weight.requires_grad and torch.is_grad_enabled()
    return None if trained else (layer.weight.detach(), None, None, 1.0)


def _together(found: Sequence[_Found]) -> kernels.ExpertLayers | None:
    """Return the layers of all experts, if all of them carry adapters of one scaling, or none."""
    stored = [W for W, *_ in found]
    A, B = [a for _, a, _, _ in found if a is not None], [b for *_, b, _ in found if b is not None]
    scalings = {scaling for *_, scaling in found}
    if len(scalings) != 1 or len(A) not in (0, len(found)):
        return None
    return kernels.ExpertLayers(stored, A, B, scalings.pop())
