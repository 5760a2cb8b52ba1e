"""How the decoder sees a layer that carries adapters, and when fused kernels may compute it.

lorakit/adapters puts an `AdaptedLayer` in the place of a layer. The decoder, the steps of decoding
and `save_model` ask that layer what it computes with, and know nothing else of adapters.

It is a class and no protocol because the decoder asks for it in every layer of every step:
isinstance takes some 12 us on a protocol with members, and 0.03 us on a class.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lorakit import kernels
from lorakit.models.hooks import has_hooks

RowGroups = Sequence[tuple[str | None, Tensor]]
"""Adapters, and the rows of a batch that each of them computes.

Each pair is an adapter's name (None for the base alone) and the numbers of its rows, int64 [n].
"""

Spans = Sequence[tuple[str, int, int]]
"""Adapters, and the tokens of a packed row that each of them computes: the first, and the end."""


class AdaptedLayer(nn.Module):
    """A module in the place of a layer while adapters are attached to it."""

    row_groups: RowGroups | None
    """The rows of a batch that each adapter computes; None where one adapter computes all."""
    spans: Spans | None
    """The adapters that have spans of a packed row here; None where one adapter computes all."""
    merged: nn.Module | None
    """The layer with an adapter in its weights; None while none is merged."""

    def low_rank_update(self) -> kernels.LoraWeights | None:
        """Return base and low-rank update, or None if there is no such update.

        For an embedding it is the update that its tied head sees.
        """
        raise NotImplementedError

    def span_updates(self) -> kernels.SpanWeights | None:
        """Return base and the updates of the adapters that have spans of a packed row.

        Return None if the layer has to be called as it is.
        """
        raise NotImplementedError

    def fusible_update(self) -> kernels.LoraWeights | None:
        """Return base and update as the fused kernels take them.

        Return None if there is no update, or if the layer has to be called as it is.
        """
        raise NotImplementedError

    def current_module(self) -> nn.Module:
        """Return the module that an update is added to, or that computes alone."""
        raise NotImplementedError

    def only_module(self) -> nn.Module | None:
        """Return the one module that computes, or None if an adapter is added to it."""
        raise NotImplementedError


def fused_weights(
    *layers: nn.Module,
) -> list[kernels.LoraWeights] | list[kernels.SpanWeights] | None:
    """Return base and update of layers that read one input, for the fused kernels.

    Return None if one of them carries no adapter, has to be called as it is (also for its hooks),
    or drops another share of the input than the others.
    """
    found: list[kernels.LoraWeights] = []
    several: list[kernels.SpanWeights] = []
    for layer in layers:
        if not isinstance(layer, AdaptedLayer) or has_hooks(layer):
            return None
        if layer.spans is None:
            weights = layer.fusible_update()
            if weights is None:
                return None
            found.append(weights)
        else:
            updates = layer.span_updates()
            if updates is None:
                return None
            several.append(updates)
    if several:
        return several
    return found if len({weights.dropout for weights in found}) == 1 else None
