"""How the decoder sees a layer that carries adapters, and when fused kernels may compute it.

The room of adapters puts an `AdaptedLayer` in the place of a layer. The models, and decoding, ask
it what it computes with; they know nothing of adapters beyond this class.

It is a class and no protocol because the decoder asks for it in every layer of every step:
isinstance takes some 12 us on a protocol with members, and 0.03 us on a class.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lorakit import kernels
from lorakit.models.hooks import has_hooks

RowGroups = Sequence[tuple[str | None, Tensor]]
"""The rows of a batch that each adapter computes: its name, None for the base, and int64 [n]."""


class AdaptedLayer(nn.Module):
    """A module in the place of a layer while adapters are attached to it."""

    row_groups: RowGroups | None
    """The rows of a batch that each adapter computes; None where one adapter computes all."""
    merged: nn.Module | None
    """The layer with an adapter in its weights, while it is merged."""

    def low_rank_update(self) -> kernels.LoraWeights | None:
        """Return the low-rank update, or None if there is none.

        The update of an embedding is the one that its tied head sees.
        """
        raise NotImplementedError

    def fusible_update(self) -> kernels.LoraWeights | None:
        """Return base and update as the fused kernels take them.

        None: there is no update, or the layer has to be called as it is.
        """
        raise NotImplementedError

    def current_module(self) -> nn.Module:
        """Return the module that an update is added to."""
        raise NotImplementedError

    def only_module(self) -> nn.Module | None:
        """Return the one module that computes, or None if an adapter is added to it."""
        raise NotImplementedError


def fused_weights(*layers: nn.Module) -> list[kernels.LoraWeights] | None:
    """Return base and update of layers that read one input, for the fused kernels.

    None: one of them carries no adapter, has to be called as it is (also for its hooks), or drops
    another share of the input than the others.
    """
    found = []
    for layer in layers:
        weights = layer.fusible_update() if isinstance(layer, AdaptedLayer) else None
        if weights is None or has_hooks(layer):
            return None
        found.append(weights)
    return found if len({weights.dropout for weights in found}) == 1 else None
