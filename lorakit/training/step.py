"""The parts of an optimizer step: gradients of its micro-batches, checks of them, and counts.

A step sums the loss over the label tokens of all its micro-batches and divides once by their
number. So a step of 8 rows has the same gradient as 1 x 8 or 8 x 1 rows, padded or packed.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.adapters.layers.wrapper import Attached
from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.data.encode import IGNORE, Example, PairExample
from lorakit.models.blocks import MoE
from lorakit.models.decoder import Decoder
from lorakit.training.losses.batch import summed_loss
from lorakit.training.losses.reference import Reference

MicroBatches = Sequence[Sequence[Example | PairExample]]


def backward(
    model: Decoder, micro_batches: MicroBatches, config: TrainConfig, reference: Reference | None
) -> tuple[list[Tensor], int]:
    """Add the gradients of the mean loss of a step to the parameters.

    The mean is over the label tokens of the step, or over its pairs. DPO compares with `reference`.
    Nothing waits for the device: the summed losses are returned as they are, each fp32 [], and
    their divisor.
    """
    examples = [example for batch in micro_batches for example in batch]
    if config.objective == "sft":
        labels = [row.labels[1:] for example in examples for row in example.answers]
        count = sum(label != IGNORE for each in labels for label in each)
    else:
        count = len(examples)
    losses = []
    for batch in micro_batches:
        loss, _ = summed_loss(model, batch, config, reference)
        (loss / count).backward()
        losses.append(loss.detach())
    return losses, count


def check_gradients(model: Decoder, layers: Mapping[str, Attached]) -> None:
    """Raise LorakitError if a parameter that is to be trained has no gradient.

    An expert of a mixture may have none: perhaps no token has chosen it yet.
    """
    experts = tuple(f"{n}.experts." for n, m in model.named_modules() if isinstance(m, MoE))
    for name, layer in layers.items():
        assert layer.selected is not None
        for ending, parameter in layer.trained_tensors(layer.selected).items():
            if parameter.grad is None and not name.startswith(experts):
                raise LorakitError(f"train: {name}.{ending} got no gradient; it is not used")


def first_not_finite(module: nn.Module) -> str:
    """Name the first parameter whose gradient is not finite, or "the loss" if there is none."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return name
    return "the loss"


def count_tokens(micro_batches: MicroBatches, packing: bool) -> tuple[int, int]:
    """Return how many tokens a step holds, and how many it computes, the padding included."""
    lengths = [
        [len(row.input_ids) for example in batch for row in example.answers]
        for batch in micro_batches
    ]
    count = sum(map(sum, lengths))
    return count, count if packing else sum(len(batch) * max(batch) for batch in lengths)
