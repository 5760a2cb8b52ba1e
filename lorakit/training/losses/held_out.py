"""The loss of held-out rows, by the objective of a run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from lorakit.config.objectives import HEADED
from lorakit.config.training import TrainConfig
from lorakit.data.encode import AnyExample
from lorakit.data.examples import Examples
from lorakit.data.schemas import Row
from lorakit.evaluation.classes import head_scores
from lorakit.evaluation.evaluate import summed_over, text_loss
from lorakit.evaluation.share import ALL, Share
from lorakit.models.decoder import Decoder
from lorakit.training.losses.batch import collated, summed_loss
from lorakit.training.losses.reference import Reference
from lorakit.training.losses.teacher import Teacher


class HeldOut(NamedTuple):
    """The rows for validation, and their examples."""

    rows: Sequence[Row]
    examples: Examples


def held_out_loss(
    model: Decoder,
    examples: Examples,
    batch_size: int,
    config: TrainConfig,
    reference: Reference | Teacher | None,
    share: Share = ALL,
) -> dict[str, float]:
    """Return the mean loss of held-out examples, with the numbers that belong to it.

    With sft they are what `text_loss` returns, with distillation "loss", "label_tokens" and "rows",
    and with a head for classes what `head_scores` returns. The other objectives give their mean as
    "loss", the share of rows that the model has the right way round as "preference_accuracy", and
    "rows". DPO and KTO compare with `reference`, as in training. Nothing has the label smoothing or
    the z-loss of training. A process computes its `share` of the batches.
    """
    if config.objective == "sft":
        return text_loss(model, examples, batch_size, share)
    if config.objective in HEADED:
        center = config.center_rewards_coefficient
        return head_scores(model, examples, batch_size, share, center_rewards_coefficient=center)
    form = None if config.form == "robust" else config.loss_type  # which is about the smoothing
    plain = replace(config, packing=False, label_smoothing_factor=0.0, loss_type=form)

    def loss(batch: Sequence[AnyExample]) -> tuple[Tensor, Tensor]:
        return summed_loss(model, collated(model, batch, plain), plain, reference)

    total, right = summed_over(model, examples, batch_size, loss, share)
    rows = len(examples)
    if config.by_tokens:
        return {"loss": total / right, "label_tokens": int(right), "rows": rows}
    return {"loss": total / rows, "preference_accuracy": right / rows, "rows": rows}
