"""What the loss of a forecast compares with: a reference, or a teacher without its weights.

A teacher is loaded whole beside the model, and frozen. Of a file of its most likely tokens nothing
is read: of each label that a batch has, as many tokens as `top_k` says come to the device.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lorakit.config.distillation import DistillationConfig
from lorakit.config.training import TrainConfig
from lorakit.data.encode import IGNORE, AnyExample, Example
from lorakit.models.config import ModelConfig
from lorakit.models.decoder import Decoder
from lorakit.training.losses.reference import Reference
from lorakit.training.losses.teacher import Teacher, TopTokens, digest
from lorakit.training.memory_plan.ledger import Ledger


def compared_with(
    train: TrainConfig,
    model: Decoder,
    teacher: Decoder | None,
    examples: Sequence[AnyExample],
    ledger: Ledger,
) -> Reference | Teacher | None:
    """Return what a run compares the model with, if it does; `reference_of_run` has the real one.

    Args:
        train: The settings of the run.
        model: The model, prepared to train.
        teacher: The teacher, if it is another model.
        examples: All examples of a step.
        ledger: What books the copy of a reference as adapters.
    """
    settings = train.distillation
    reference: Reference | None = None
    if train.compares:
        reference = Reference(model)
        ledger.own(("adapters", ""), reference.tensors.values())
    if settings is None:
        return reference
    source = reference or teacher or _Tokens(settings, model.config, examples)
    return Teacher(settings, source)


class _Tokens(TopTokens):
    """A file of a teacher's most likely tokens that nobody has read."""

    def __init__(
        self, settings: DistillationConfig, config: ModelConfig, examples: Sequence[AnyExample]
    ):
        self.vocabulary, self.temperature = config.vocab_size, settings.temperature
        self.top_k = min(settings.top_k, self.vocabulary)
        rows = [each for each in examples if isinstance(each, Example)]
        self._labels = {digest(row): sum(i != IGNORE for i in row.labels[1:]) for row in rows}

    def of_rows(self, digests: Iterable[bytes], device: torch.device) -> tuple[Tensor, Tensor]:
        n, k = sum(self._labels[each] for each in digests), self.top_k
        others = int(k < self.vocabulary)
        words = torch.empty(n, k, dtype=torch.int64, device=device)
        return words, torch.empty(n, k + others, dtype=torch.float32, device=device)
