"""The loss of held-out rows, by the objective of a run."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lorakit.config.training import TrainConfig
from lorakit.data.encode import Example, PairExample
from lorakit.data.examples import Examples
from lorakit.evaluation.evaluate import summed_over, text_loss
from lorakit.evaluation.share import ALL, Share
from lorakit.models.decoder import Decoder
from lorakit.training.losses.batch import collated, summed_loss
from lorakit.training.losses.reference import Reference


def held_out_loss(
    model: Decoder,
    examples: Examples,
    batch_size: int,
    config: TrainConfig,
    reference: Reference | None,
    share: Share = ALL,
) -> dict[str, float]:
    """Return the mean loss of held-out examples, with the numbers that belong to it.

    Rows with one answer give what `text_loss` returns. Pairs give the mean of the objective as
    "loss", the share that the model has the right way round as "preference_accuracy", and "rows".
    DPO compares with `reference`, as in training. Neither kind has the label smoothing or the
    z-loss of training. A process computes its `share` of the batches.
    """
    if config.objective == "sft":
        return text_loss(model, examples, batch_size, share)
    plain = replace(config, packing=False, label_smoothing_factor=0.0)

    def loss(batch: Sequence[Example | PairExample]) -> tuple[Tensor, Tensor]:
        return summed_loss(model, collated(model, batch, plain), plain, reference)

    total, right = summed_over(model, examples, batch_size, loss, share)
    pairs = len(examples)
    return {"loss": total / pairs, "preference_accuracy": right / pairs, "rows": pairs}
