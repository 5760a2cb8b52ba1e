"""The loss of a batch, by the objective of a run."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lorakit import kernels
from lorakit.config.training import TrainConfig
from lorakit.data.batching import collate, real_tokens
from lorakit.data.encode import Example, PairExample
from lorakit.data.packing import collate_packed
from lorakit.models.decoder import Decoder
from lorakit.training.losses.preference import pair_losses
from lorakit.training.losses.reference import Reference


class Batch(NamedTuple):
    """The tensors of a batch, as `Decoder.loss` takes them.

    Attributes:
        ids: int64 [B, T], on the model's device.
        labels: int64 [B, T], in host memory, where they can be counted.
        attention_mask: bool [B, T], on the model's device, or None where padding does not matter.
        cu_seqlens: int32 [n + 1], in host memory, of packed documents; else None.
    """

    ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None


def collated(model: Decoder, batch: Sequence[Example | PairExample], config: TrainConfig) -> Batch:
    """Return the tensors of a batch: of pairs, the answers chosen and then those rejected.

    What the device needs is on its way there. The host does not wait for it.
    """
    rows = [example.answers[0] for example in batch]
    if config.objective != "sft":
        rows += [example.answers[1] for example in batch]
    bounds: Tensor | None = None
    mask: Tensor | None = None
    if config.packing:
        ids, labels, bounds = collate_packed(rows)
    else:
        ids, labels = collate(rows)
        if model.config.by_length:
            mask = kernels.dispatch.sent(real_tokens(rows), model.device)
    return Batch(kernels.dispatch.sent(ids, model.device), labels, mask, bounds)


def summed_loss(
    model: Decoder, batch: Batch, config: TrainConfig, reference: Reference | None
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a batch, and its number of label tokens.

    For pairs the second number is how many of them the model has the right way round. DPO compares
    with `reference`, as `pair_losses` takes it.
    """
    ids, labels, mask, bounds = batch
    smoothing = config.label_smoothing_factor
    if config.objective == "sft":
        return model.loss(
            ids,
            labels,
            attention_mask=mask,
            cu_seqlens=bounds,
            label_smoothing=smoothing,
            z_loss=config.z_loss,
        )
    losses, prefers = pair_losses(
        model,
        ids,
        labels,
        objective=config.objective,
        beta=config.beta,
        label_smoothing=smoothing,
        attention_mask=mask,
        cu_seqlens=bounds,
        reference=reference,
    )
    return losses.sum(), prefers.sum()
