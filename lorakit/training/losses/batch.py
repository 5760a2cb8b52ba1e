"""Carried out of lorakit/evaluation.py."""

from collections.abc import Sequence

from torch import Tensor

from lorakit.config.training import TrainConfig
from lorakit.data.batching import collate
from lorakit.data.encode import Example, PairExample
from lorakit.data.packing import collate_packed
from lorakit.models.decoder import Decoder
from lorakit.training.losses.preference import pair_losses


def summed_loss(
    model: Decoder, batch: Sequence[Example | PairExample], config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """The summed loss of a batch, and how many label tokens it has, or of pairs how many the model
    has the right way round.
    """
    pairs = config.objective != "sft"
    if pairs:
        batch = [e.chosen for e in batch] + [e.rejected for e in batch]
    ids, labels, *bounds = collate_packed(batch) if config.packing else collate(batch)
    where = {"cu_seqlens": bounds[0] if bounds else None}
    inputs = ids.to(model.device), labels.to(model.device)
    smoothing = config.label_smoothing_factor
    if not pairs:
        form = {"label_smoothing": smoothing, "z_loss": config.z_loss}
        return model.loss(*inputs, **where, **form)
    form = {"objective": config.objective, "beta": config.beta, "label_smoothing": smoothing}
    losses, prefers = pair_losses(model, *inputs, **where, **form)
    return losses.sum(), prefers.sum()
