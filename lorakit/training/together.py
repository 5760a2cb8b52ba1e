"""The gradients of several adapters in one pass over one frozen model.

    row     a a a a a b b b c c c c      the rows of adapters a, b, c, packed as documents
    layer   W x of all, and to each span its own s B A x       (kernels/ops/lora_linear/spans.py)
    loss    sum over adapters of (sum of its tokens' losses / its label tokens)

No document sees another, and no adapter's parameters see another's tokens. So the gradient of the
sum holds the gradient of each adapter's own mean loss, as if it was alone.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from lorakit.adapters.manage import adapter_spans
from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.data.encode import AnyExample, count_labels
from lorakit.models.decoder import Decoder
from lorakit.training.learner import Learned, Learner
from lorakit.training.losses.batch import row_logprobs


def together(
    model: Decoder,
    learners: Mapping[str, Learner],
    taken: Mapping[str, Sequence[AnyExample]],
    config: TrainConfig,
) -> dict[str, Learned]:
    """Add the gradients of the mean loss of each adapter's examples, and return what they tell.

    A pass has so many examples of each adapter as are computed at a time. The config packs them.
    Raises LorakitError if an adapter's examples have nothing to learn.
    """
    counts = {name: sum(map(count_labels, examples)) for name, examples in taken.items()}
    for name, count in counts.items():
        if not count:
            raise LorakitError(f"no row of adapter {name!r} has a token that is learned")
    losses: dict[str, list[Tensor]] = {name: [] for name in taken}
    size = config.rows_at_a_time
    with ExitStack() as adding:
        totals = {n: adding.enter_context(learners[n].adding(c)) for n, c in counts.items()}
        for start in range(0, max(map(len, taken.values())), size):
            parts = {name: some for name in taken if (some := taken[name][start : start + size])}
            for name, loss in packed_pass(model, parts, config, totals).items():
                losses[name].append(loss)
        for name in taken:
            learners[name].add(losses[name], len(losses[name]))
    found = {}
    for name, examples in taken.items():
        mean = float(torch.stack(losses[name]).sum()) / counts[name]
        tokens = sum(len(each.input_ids) for each in examples)
        found[name] = Learned(mean, counts[name], tokens, [])
    return found


def check_together(config: TrainConfig) -> None:
    """Raise LorakitError unless several adapters can learn by the loss of a config in one pass."""
    more = config.label_smoothing_factor or config.z_loss or config.neftune_noise_alpha
    if config.form != "nll" or more or config.frozen_dtype is not None:
        raise LorakitError(
            "several adapters in one pass: the objective is sft, without loss_type dft, "
            "label_smoothing_factor, z_loss, neftune_noise_alpha and frozen_dtype"
        )


def tokens_of_passes(taken: Mapping[str, Sequence[AnyExample]], config: TrainConfig) -> int:
    """Return the most tokens that a pass of `together` has."""
    size, found = config.rows_at_a_time, defaultdict[int, int](int)
    for examples in taken.values():
        for i in range(len(examples)):
            found[i // size] += len(examples[i].input_ids)
    return max(found.values())


def packed_pass(
    model: Decoder,
    parts: Mapping[str, Sequence[AnyExample]],
    config: TrainConfig,
    totals: Mapping[str, int],
) -> dict[str, Tensor]:
    """Add the gradients of one packed row, and return the summed loss of each adapter, fp32 [].

    Args:
        model: The model with the adapters.
        parts: The examples of each adapter in the row, by its name.
        config: How the loss is computed; it packs.
        totals: What the summed loss of each adapter is divided by for its gradients.
    """
    spans = [(name, sum(len(e.input_ids) for e in part)) for name, part in parts.items()]
    every = [example for part in parts.values() for example in part]
    with adapter_spans(model, spans):
        values = torch.cat(row_logprobs(model, every, config))
        labels = [sum(map(count_labels, part)) for part in parts.values()]
        sums = [-each.sum() for each in values.split(labels)]
        means = [each / totals[name] for name, each in zip(parts, sums, strict=True)]
        torch.stack(means).sum().backward()
    return {name: each.detach() for name, each in zip(parts, sums, strict=True)}
