"""The losses of heads that tell classes, numbers, or how good an answer is.

    classes   -log softmax(z)[y]                  z the outputs of the head, y the class
    numbers   (z - y)^2
    rewards   -log sigmoid(r_c - r_r - m) + lambda (r_c + r_r)^2

The first two are those of transformers' `ForSequenceClassification`. The third is that of Bradley
and Terry, as TRL's RewardTrainer has it: r_c is the reward of the better answer, r_r that of the
worse one, m the margin of the row (arXiv:2307.09288, equation 2), and lambda keeps rewards near 0
(arXiv:2312.09244).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.config.classifier import ClassifierConfig
from lorakit.config.errors import LorakitError
from lorakit.config.objectives import HEADED
from lorakit.config.training import TrainConfig
from lorakit.models.classifier import Classifier, classifier_in
from lorakit.models.decoder import Decoder


class HeadBatch(NamedTuple):
    """What the head needs of a batch, on the model's device.

    Attributes:
        last: Where each row is read, int64 [n]; see `lorakit.models.classifier.last_tokens`.
        targets: What it is to tell: int64 [n] classes, fp32 [n] numbers, or the margins of n / 2
            pairs, fp32 [n / 2].
    """

    last: Tensor
    targets: Tensor


def classification_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of each row: cross-entropy of classes, squared error of a number.

    Args:
        logits: The outputs of the head, [n, C].
        targets: int64 [n], the classes; or [n] numbers, of one output.
        label_smoothing: The share of a label that is spread over all classes.

    Returns:
        The losses, [n].

    Raises:
        LorakitError: Targets are numbers, and there are several outputs.
    """
    if not targets.is_floating_point():
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if logits.shape[-1] != 1:
        raise LorakitError(f"regression has one output, and there are {logits.shape[-1]}")
    return (logits[:, 0] - targets).square()


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float = 0.0,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """Return the loss of each pair of rewards; see the module.

    Args:
        chosen: The rewards of the better answers, [B].
        rejected: Those of the worse ones, [B].
        margin: How far the better one is to be ahead, [B] or one number for all.
        center_rewards_coefficient: The weight of the squared sum of both rewards.

    Returns:
        The losses, [B].
    """
    losses = -F.logsigmoid(chosen - rejected - margin)
    return losses + center_rewards_coefficient * (chosen + rejected).square()


def head_loss(
    model: Decoder,
    input_ids: Tensor,
    head: HeadBatch,
    config: TrainConfig,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a batch, and how many rows or pairs are right.

    A number is never counted as right. The arguments are those of `Classifier.forward`.
    """
    outputs = classifier_in(model, "train")(
        input_ids, attention_mask=attention_mask, cu_seqlens=cu_seqlens, last=head.last
    )
    if config.objective == "reward":
        chosen, rejected = outputs[:, 0].chunk(2)
        losses = reward_loss(
            chosen,
            rejected,
            margin=head.targets,
            center_rewards_coefficient=config.center_rewards_coefficient,
        )
        return losses.sum(), (chosen > rejected).sum()
    smoothing = config.label_smoothing_factor
    losses = classification_loss(outputs, head.targets, label_smoothing=smoothing)
    return losses.sum(), (outputs.detach().argmax(-1) == head.targets).sum()


def check_head(model: Decoder, config: TrainConfig) -> None:
    """Raise LorakitError unless the head of a model fits the objective of a run."""
    objective = config.objective
    if objective not in HEADED:
        if isinstance(model, Classifier):
            raise LorakitError(
                f"train: objective {objective} learns tokens, and the model has a head for "
                "classes: set objective to classification or reward"
            )
        return
    head = classifier_in(model, f"train: objective {objective}").classifier
    if objective == "reward" and len(head.labels) > 1:
        raise LorakitError(
            f"train: objective reward needs a head of one output, and this one has "
            f"{len(head.labels)}"
        )
    _check_smoothing(head, config)


def _check_smoothing(head: ClassifierConfig, config: TrainConfig) -> None:
    if config.label_smoothing_factor and head.regression:
        raise LorakitError("train: label_smoothing_factor does not go with labels that are numbers")


def targets_of(classifier: ClassifierConfig, labels: list[float]) -> Tensor:
    """Return targets of rows as a tensor, int64 classes or fp32 numbers."""
    return torch.tensor(labels, dtype=torch.float32 if classifier.regression else torch.int64)
