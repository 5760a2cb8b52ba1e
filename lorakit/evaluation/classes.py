"""What a head for classes makes of rows, and how good that is.

    of classes    loss, accuracy, macro_f1
    of numbers    loss (the mean squared error), mean_absolute_error, pearson
    of pairs      loss, preference_accuracy, reward_margin

The outputs of all rows are a few numbers each. So they are brought to the host, and all that is
told follows from them in fp64.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lorakit.config.classifier import ClassifierConfig
from lorakit.config.errors import LorakitError
from lorakit.data.batching import collate, real_tokens
from lorakit.data.examples import Examples
from lorakit.evaluation.share import ALL, Share
from lorakit.models.classifier import Classifier, classifier_in, last_tokens
from lorakit.models.decoder import Decoder


def check_labels(classifier: ClassifierConfig, examples: Examples) -> None:
    """Raise LorakitError, with the place of the row, for a label that the head does not have."""
    known = set[tuple[type, object]]()
    for number, label in enumerate(examples.labels):
        if (type(label), label) in known:
            continue
        try:
            classifier.target(label)
        except LorakitError as error:
            raise LorakitError(f"{examples.place(number)}: {error}") from None
        known.add((type(label), label))


@torch.no_grad()
def outputs_of(
    model: Classifier, examples: Examples, batch_size: int, share: Share = ALL
) -> Tensor:
    """Return the outputs of the head, fp64 [examples, answers, C], in host memory.

    Rows of like length are computed together. A process computes its `share` of the batches, and
    every process returns all. The model is in evaluation mode meanwhile.
    """
    ordered = sorted(range(len(examples)), key=examples.lengths.__getitem__)
    cut = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    mine, was_training = share.of(cut), model.training
    found = list[list[list[float]]]()
    model.eval()
    try:
        for numbers in tqdm(mine, desc="evaluating", unit="batch", disable=None, leave=False):
            found.append(_outputs(model, examples, numbers))
    finally:
        model.train(was_training)
    C = len(model.classifier.labels)
    answers = len(examples[0].answers)
    result = torch.empty(len(examples), answers, C, dtype=torch.float64)
    for numbers, outputs in zip(cut, share.collect(found), strict=True):
        result[numbers] = torch.tensor(outputs, dtype=torch.float64).view(-1, answers, C)
    return result


def _outputs(model: Classifier, examples: Examples, numbers: Sequence[int]) -> list[list[float]]:
    rows = [row for i in numbers for row in examples[i].answers]
    ids, _ = collate(rows)
    mask = real_tokens(rows).to(model.device) if model.config.by_length else None
    last = last_tokens([row.input_ids for row in rows], model.config.pad_token_id, ids.shape[1])
    options = {"attention_mask": mask, "last": last.to(model.device)}
    found: list[list[float]] = model(ids.to(model.device), **options).float().tolist()
    return found


def class_scores(
    model: Classifier, examples: Examples, batch_size: int, share: Share = ALL
) -> dict[str, float]:
    """Return the mean loss of rows with a class or a number, and how good the head is."""
    head = model.classifier
    outputs = outputs_of(model, examples, batch_size, share)[:, 0]
    targets = torch.tensor([head.target(label) for label in examples.labels], dtype=torch.float64)
    rows = {"rows": len(examples)}
    if head.regression:
        return _number_scores(outputs[:, 0], targets) | rows
    classes, said = targets.long(), outputs.argmax(-1)
    return {
        "loss": F.cross_entropy(outputs, classes).item(),
        "accuracy": (said == classes).double().mean().item(),
        "macro_f1": _macro_f1(said, classes, len(head.labels)),
    } | rows


def _number_scores(said: Tensor, wanted: Tensor) -> dict[str, float]:
    apart = said - wanted
    x, y = said - said.mean(), wanted - wanted.mean()
    width = (x.square().sum() * y.square().sum()).sqrt()
    return {
        "loss": apart.square().mean().item(),
        "mean_absolute_error": apart.abs().mean().item(),
        "pearson": ((x * y).sum() / width).item() if width else 0.0,
    }


def _macro_f1(said: Tensor, wanted: Tensor, classes: int) -> float:
    """Return the mean F1 of the classes that occur in rows or answers, as scikit-learn has it."""
    right = torch.bincount(wanted[said == wanted], minlength=classes).double()
    both = torch.bincount(said, minlength=classes) + torch.bincount(wanted, minlength=classes)
    there = both > 0
    return (2 * right[there] / both[there]).mean().item()


def pair_scores(
    model: Classifier,
    examples: Examples,
    batch_size: int,
    share: Share = ALL,
    *,
    center_rewards_coefficient: float = 0.0,
) -> dict[str, float]:
    """Return the mean loss of pairs under a reward model, and how good it is.

    "reward_margin" is how far the reward of the better answer is ahead in the mean.
    """
    chosen, rejected = outputs_of(model, examples, batch_size, share)[:, :, 0].unbind(1)
    margins = torch.tensor(examples.margins, dtype=torch.float64)
    ahead = chosen - rejected
    losses = -F.logsigmoid(ahead - margins)
    losses = losses + center_rewards_coefficient * (chosen + rejected).square()
    return {
        "loss": losses.mean().item(),
        "preference_accuracy": (ahead > 0).double().mean().item(),
        "reward_margin": ahead.mean().item(),
        "rows": len(examples),
    }


def head_scores(
    model: Decoder,
    examples: Examples,
    batch_size: int,
    share: Share = ALL,
    *,
    center_rewards_coefficient: float = 0.0,
) -> dict[str, float]:
    """Return the scores of pairs or of rows with labels, whichever they are; see the module."""
    head = classifier_in(model, "evaluate")
    if not examples.margins:
        return class_scores(head, examples, batch_size, share)
    center = center_rewards_coefficient
    return pair_scores(head, examples, batch_size, share, center_rewards_coefficient=center)
