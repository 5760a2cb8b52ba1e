"""The loss of held-out rows, by the objective of a run."""

from dataclasses import replace

from lorakit.config.training import TrainConfig
from lorakit.data.encode import Examples
from lorakit.evaluation.evaluate import summed_over, text_loss
from lorakit.models.decoder import Decoder
from lorakit.training.losses.batch import summed_loss


def held_out_loss(
    model: Decoder, examples: Examples, batch_size: int, config: TrainConfig
) -> dict[str, float]:
    """Return the loss of held-out examples, as `text_loss` does, or of pairs.

    The loss of pairs is the mean of the objective, with the share that the model has the right way
    round as "preference_accuracy". The model is as in use: not packed, smoothed or regularized.
    """
    if config.objective == "sft":
        return text_loss(model, examples, batch_size)
    plain = replace(config, packing=False, label_smoothing_factor=0.0)
    total, right = summed_over(
        model, examples, batch_size, lambda batch: summed_loss(model, batch, plain)
    )
    pairs = len(examples)
    return {"loss": total / pairs, "preference_accuracy": right / pairs, "rows": pairs}
