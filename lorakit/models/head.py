"""The output head: it turns hidden states into logits, and into the loss.

    logits = hidden head^T / s,   and c tanh(logits / c) where the family has a soft cap c

s is 1 in most families. The hidden states are divided by it, not the logits, which are many more.

The head is a layer of its own, `lm_head`, or the embedding itself where the two are tied. Either
may be dense or packed, and either may carry adapters.

The logits of a training step, [tokens, vocabulary], would be its largest tensor by far.
`kernels.linear_cross_entropy` never holds them all. It takes the weight of the head and at most a
plain low-rank update. A head that computes anything more (a hook, dropout, DoRA, an adapter for
each row) is called instead, on the positions that have a label.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import kernels
from lorakit.config.errors import LorakitError
from lorakit.kernels.ops.cross_entropy.linear import chunk_rows
from lorakit.models.adapted_layer import AdaptedLayer
from lorakit.models.hooks import has_hooks
from lorakit.models.packed_layers import PackedWeight
from lorakit.models.recompute import run_recomputed
from lorakit.models.sharding import gathered_in_backward


class OutputHead(NamedTuple):
    """The layer that turns hidden states into logits."""

    layer: nn.Module
    """`lm_head`, or the embedding if the head is tied to it."""
    tied: bool
    """Whether the layer is the embedding."""
    softcap: float | None
    """Soft cap c of the logits; None: they have none."""
    float8: kernels.Float8Weight | None = None
    """The weight for the products of `loss`, if they are to run in float8."""
    scaling: float = 1.0
    """Number s that the logits are divided by."""
    sharded: bool = False
    """Whether the weight is whole only while this is called."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., H]."""
        logits = self._before_softcap(self._scaled(hidden))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        rows: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        dft: bool = False,
        statistics: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy, and how many targets counted.

        A target of -100 does not count. The head skips its hidden state, unless it has an adapter
        for each row, which has to see whole rows.

        Args:
            hidden: [B, T, H].
            targets: int64 [B, T], the token that each position predicts, perhaps in host memory;
                or [n], those of `rows`.
            rows: The positions that the head takes; see `kernels.linear_cross_entropy`.
            label_smoothing: See `kernels.cross_entropy`.
            z_loss: See `kernels.cross_entropy`.
            dft: See `kernels.cross_entropy`.
            statistics: See `kernels.cross_entropy`.

        Returns:
            The sum, fp32 [], and the count, int64 [].
        """
        hidden, found = self._scaled(hidden), self._bare_weight()
        if found is not None:
            stored, update = found
            weight = stored if self.float8 is None else self.float8
            lora = None if update is None else (update.lora_A, update.lora_B, update.scaling)
            return kernels.linear_cross_entropy(
                hidden,
                weight,
                targets,
                rows=rows,
                lora=lora,
                softcap=self.softcap,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                dft=dft,
                statistics=statistics,
            )
        if isinstance(self.layer, AdaptedLayer) and self.layer.row_groups is not None:
            logits = self._before_softcap(hidden)
            logits, counted = kernels.labelled(logits, targets, rows=rows)
        else:
            hidden, counted = kernels.labelled(hidden, targets, rows=rows)
            logits = self._before_softcap(hidden)
        return kernels.cross_entropy(
            logits,
            counted,
            softcap=self.softcap,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            dft=dft,
            statistics=statistics,
        )

    def part_losses(
        self, hidden: Tensor, targets: Tensor, words: int, parts: Sequence[int]
    ) -> Tensor:
        """Return the summed cross-entropy of each part of the targets, fp32 [parts].

        The head multiplies all at once. Where it is a frozen weight, the gradients of a part are
        those of `loss` for the part alone. It has no update here.

        Args:
            hidden: [B, T, H].
            targets: int64 [B, T], as `loss` takes them.
            words: V, the size of the vocabulary.
            parts: How many of the targets that count belong to each part, in their order.
        """
        weight = self.frozen_weight()
        if weight is None:
            losses = self.token_losses(hidden, targets, words).split(list(parts))
            return torch.stack([each.sum() for each in losses])
        sums, _ = kernels.linear_cross_entropy(
            self._scaled(hidden), weight, targets, softcap=self.softcap, parts=parts
        )
        return sums

    def token_losses(self, hidden: Tensor, targets: Tensor, words: int) -> Tensor:
        """Return the cross-entropy of each target that counts, in their order.

        The logits exist for a chunk of positions at a time, and backward computes them again.

        Args:
            hidden: [B, T, H].
            targets: int64 [B, T], as `loss` takes them.
            words: V, the size of the vocabulary.

        Returns:
            The losses in nats, fp32 [n].
        """
        hidden, counted = kernels.labelled(self._scaled(hidden), targets)
        size = max(1, chunk_rows(len(counted), words, hidden))
        chunks = zip(hidden.split(size), counted.split(size), strict=True)
        return torch.cat([run_recomputed(self._losses_of_chunk, *chunk) for chunk in chunks])

    def _losses_of_chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._before_softcap(hidden)
        return kernels.token_cross_entropy(logits, targets, softcap=self.softcap)

    def tempered(self, temperature: float) -> "OutputHead":
        """Return the head whose logits, the soft cap applied, are divided by a temperature."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return self._replace(softcap=softcap, scaling=self.scaling * temperature)

    def frozen_weight(self) -> Tensor | kernels.Packed | None:
        """Return the weight [V, H] that `loss` multiplies with, if it is frozen and nothing more.

        A low-rank update of it does not count.
        """
        found = self._bare_weight()
        if found is None or (isinstance(found[0], Tensor) and found[0].requires_grad):
            return None
        return found[0]

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.scaling == 1 else hidden / self.scaling

    def _before_softcap(self, hidden: Tensor) -> Tensor:
        logits = self._called(hidden)
        if self.sharded and isinstance(self.layer, AdaptedLayer):
            return gathered_in_backward(logits, self.layer)
        return logits

    def _called(self, hidden: Tensor) -> Tensor:
        if not self.tied:
            return self.layer(hidden)
        embedding, update = self._embedding()
        if update is not None:
            return kernels.lora_linear(hidden, update)
        if isinstance(embedding, PackedWeight):
            return kernels.frozen_linear(hidden, embedding.quantized)
        assert isinstance(embedding.weight, Tensor)
        return F.linear(hidden, embedding.weight)

    def _embedding(self) -> tuple[nn.Module, kernels.LoraWeights | None]:
        """Return the embedding that the head is tied to, and the low-rank update of both."""
        if not isinstance(self.layer, AdaptedLayer):
            return self.layer, None
        if self.layer.row_groups is not None:
            raise LorakitError("adapter_rows: a head that is tied has one adapter for all rows")
        return self.layer.current_module(), self.layer.low_rank_update()

    def _bare_weight(self) -> tuple[Tensor | kernels.Packed, kernels.LoraWeights | None] | None:
        """Return the weight [V, H] that the head multiplies with, and its low-rank update.

        Return None if the head computes anything more.
        """
        layer: nn.Module | None = self.layer
        update = None
        if self.tied:
            layer, update = self._embedding()
        elif has_hooks(self.layer):
            return None
        elif isinstance(self.layer, AdaptedLayer) and self.layer.row_groups is None:
            update = self.layer.low_rank_update()
            layer = self.layer.only_module() if update is None else self.layer.current_module()
        if update is not None and (
            update.dropout or update.magnitude is not None or update.bias is not None
        ):
            return None
        if isinstance(layer, PackedWeight):
            return layer.quantized, update
        if type(layer) is nn.Linear or type(layer) is nn.Embedding:
            return layer.weight, update
        return None
