"""The parts of an optimizer step: its batches, their gradients, and what comes back to the host.

A step sums the loss over the label tokens of all its micro-batches and divides once by their
number. So a step of 8 rows has the same gradient as 1 x 8 or 8 x 1 rows, padded or packed.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.data.encode import AnyExample, count_labels
from lorakit.evaluation.share import ALL, Share
from lorakit.models.decoder import Decoder
from lorakit.models.mlp import Experts
from lorakit.models.shards import is_sharded
from lorakit.training.captured import CapturedStep, HostRow
from lorakit.training.device_step import Told, read
from lorakit.training.draws import drawing_from, seed_of
from lorakit.training.gradients import ALONE, SUMS, GradientSum
from lorakit.training.losses.batch import Batch, collated, summed_loss
from lorakit.training.losses.reference import Reference
from lorakit.training.losses.teacher import Teacher


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step that can begin: its batches, the device's part of them on its way there."""

    number: int
    """The number of the step, from 1."""
    rows: list[int]
    """The numbers of its rows."""
    parts: int
    """The number of its micro-batches, on all ranks."""
    batches: list[Batch | None]
    """This rank's micro-batch of each round, if it is launched op by op; None if it has none."""
    packed: list[HostRow | None]
    """The same, if the step is a CUDA graph."""
    count: int
    """What its summed loss is divided by: label tokens, or rows of a preference."""
    tokens: int
    """How many tokens its rows have."""
    computed: int
    """How many tokens are computed, the padding included."""
    filler: Batch | None = None
    """What a rank computes, and forgets, in a round without a batch for it; see `backward`."""


def prepare(
    model: Decoder,
    examples: Sequence[AnyExample],
    number: int,
    micro_batches: Sequence[Sequence[int]],
    config: TrainConfig,
    captured: CapturedStep | None,
    share: Share = ALL,
) -> Prepared:
    """Collate the micro-batches of a step, lists of row numbers, and send them to the device.

    A rank collates its `share` of them. A step that is `captured` writes them there itself.
    """
    taken = [[examples[i] for i in rows] for rows in micro_batches]
    each = [example for batch in taken for example in batch]
    count = sum(map(count_labels, each)) if config.by_tokens else len(each)
    rows = [i for batch in micro_batches for i in batch]
    batches, packed = list[Batch | None](), list[HostRow | None]()
    tokens, computed = _count_tokens(taken, config.packing)
    filler: Batch | None = None
    if captured is None:
        mine = share.rounds(taken)
        if model.mesh is not None and None in mine:
            filler = collated(model, [min(each, key=_length)], config)
        batches = [None if each is None else collated(model, each, config) for each in mine]
    else:
        packed = captured.prepare(number, taken, count)
        computed = len(taken) * captured.inputs.tokens
    return Prepared(number, rows, len(taken), batches, packed, count, tokens, computed, filler)


def backward(
    model: Decoder,
    step: Prepared,
    config: TrainConfig,
    reference: Reference | Teacher | None,
    sums: GradientSum = ALONE,
) -> tuple[Tensor, Tensor]:
    """Add the gradients of the mean loss of a step to the parameters.

    The mean is over the label tokens of the step, with objectives of preference over its rows. What
    DPO, KTO and distillation compare with is `reference`.

    A rank computes its share of the micro-batches, and `sums` adds up what all have computed.
    A pass through sharded weights is a meeting of all ranks: one that has no micro-batch left comes
    with a filler. Nothing waits for the device.

    Returns:
        The summed losses of the n micro-batches of all ranks, fp32 [n], dense, and the `statistics`
        of `kernels.cross_entropy`, of the whole step, fp32 [2]; 0 with other objectives than sft.
    """
    found = list[Tensor]()
    first = (step.number - 1) * config.batches_of_step + sums.share.rank
    for i, batch in enumerate(step.batches):
        last = i == len(step.batches) - 1
        if batch is not None:
            seed = seed_of(config.seed, first + i * sums.share.size)
            with drawing_from(seed, model.device):
                statistics = torch.zeros(SUMS - 1, device=model.device)
                loss, _ = summed_loss(model, batch, config, reference, statistics)
                sums.begin_round(True, last)
                (loss / step.count).backward()
            found.append(torch.cat([loss.detach().view(1), statistics]))
        elif step.filler is not None:
            with drawing_from(config.seed, model.device):
                loss, _ = summed_loss(model, step.filler, config, reference)
                sums.begin_round(False, last)
                with _forgotten_gradients(model):
                    loss.backward()
        sums.end_round(last)
    losses, statistics = torch.stack(sums.finish(found, step.parts)).split([1, SUMS - 1], 1)
    return losses.reshape(-1).contiguous(), statistics.sum(0)


def split_told(
    numbers: Sequence[float], count: int, tells_tokens: bool
) -> tuple[Told, dict[str, float]]:
    """Return what the numbers of a step say of it, and by TRL's names of a label token.

    Where `tells_tokens`, the `statistics` of its `count` label tokens are the last of them.
    """
    end = len(numbers) - (SUMS - 1) * tells_tokens
    names = ("mean_token_accuracy", "entropy") if tells_tokens else ()
    means = {name: each / count for name, each in zip(names, numbers[end:], strict=True)}
    return read(numbers[:end]), means


@contextmanager
def _forgotten_gradients(model: Decoder) -> Iterator[None]:
    """Let the parameters have the gradients, behind the block, that they had before it.

    Those of divided weights are of all ranks, and stay.
    """
    before = [(p, p.grad) for p in model.parameters() if not is_sharded(p)]
    for p, _ in before:
        p.grad = None
    yield
    for p, grad in before:
        p.grad = grad


def _length(example: AnyExample) -> int:
    """Return how many tokens the answers of an example have."""
    return sum(len(row.input_ids) for row in example.answers)


def has_experts(model: Decoder) -> bool:
    """Return whether a parameter may have a gradient in some steps and none in others."""
    return any(isinstance(module, Experts) for module in model.modules())


def check_gradients(model: Decoder, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise LorakitError if one of the named parameters, which are to be trained, has no gradient.

    An expert of a mixture may have none: perhaps no token has chosen it yet.
    """
    experts = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, Experts))
    for name, parameter in parameters:
        if parameter.grad is None and not name.startswith(experts):
            raise LorakitError(f"train: {name} got no gradient; it is not used")


def _count_tokens(micro_batches: Sequence[Sequence[AnyExample]], packing: bool) -> tuple[int, int]:
    """Return how many tokens a step holds, and how many it computes, the padding included."""
    lengths = [
        [len(row.input_ids) for example in batch for row in example.answers]
        for batch in micro_batches
    ]
    count = sum(map(sum, lengths))
    return count, count if packing else sum(len(batch) * max(batch) for batch in lengths)
