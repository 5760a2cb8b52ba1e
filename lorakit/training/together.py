"""The gradients of several adapters in one pass over one frozen model.

    row     a a a a a b b b c c c c      the rows of adapters a, b, c, packed as documents
    layer   W x of all, and to each span its own s B A x       (kernels/ops/lora_linear/spans.py)
    loss    sum over adapters of (sum of its tokens' losses / its label tokens)

No document sees another, and no adapter's parameters see another's tokens. So the gradient of the
sum holds the gradient of each adapter's own mean loss, as if it was alone. A pass has of each
adapter the batch that it would have alone.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.adapters.manage import adapter_spans
from lorakit.config.errors import LorakitError
from lorakit.config.training import TrainConfig
from lorakit.data.batching import in_order
from lorakit.data.encode import AnyExample, count_labels
from lorakit.models.decoder import Decoder
from lorakit.models.rows import next_tokens
from lorakit.training.learner import Learned, Learner
from lorakit.training.losses.batch import collated


def together(
    model: Decoder,
    learners: Mapping[str, Learner],
    taken: Mapping[str, Sequence[AnyExample]],
    config: TrainConfig,
) -> dict[str, Learned]:
    """Add the gradients of the mean loss of each adapter's examples, and return what they tell.

    The passes are those of `passes_of`. Raises LorakitError if an adapter's examples have nothing
    to learn.
    """
    counts = {name: sum(map(count_labels, examples)) for name, examples in taken.items()}
    for name, count in counts.items():
        if not count:
            raise LorakitError(f"no row of adapter {name!r} has a token that is learned")
    losses: dict[str, list[Tensor]] = {name: [] for name in taken}
    packed = replace(config, packing=True)
    with ExitStack() as adding:
        totals = {n: adding.enter_context(learners[n].adding(c)) for n, c in counts.items()}
        for parts in passes_of(taken, config):
            for name, loss in packed_pass(model, parts, packed, totals).items():
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


def passes_of(
    taken: Mapping[str, Sequence[AnyExample]], config: TrainConfig
) -> list[dict[str, list[AnyExample]]]:
    """Return the examples of each adapter in each pass: its batches, as it has them alone."""
    passes: list[dict[str, list[AnyExample]]] = []
    for name, examples in taken.items():
        batches = in_order([len(each.input_ids) for each in examples], config)
        passes += [{} for _ in range(len(batches) - len(passes))]
        for parts, rows in zip(passes, batches, strict=False):  # others may have more
            parts[name] = [examples[i] for i in rows]
    return passes


def tokens_of_passes(taken: Mapping[str, Sequence[AnyExample]], config: TrainConfig) -> int:
    """Return the most tokens that a pass of `together` has."""
    return max(
        sum(len(each.input_ids) for part in parts.values() for each in part)
        for parts in passes_of(taken, config)
    )


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
    batch = collated(model, [example for part in parts.values() for example in part], config)
    assert batch.cu_seqlens is not None  # the config packs
    labels = [sum(map(count_labels, part)) for part in parts.values()]
    with adapter_spans(model, spans):
        hidden = model.hidden_for_loss(batch.ids, batch.labels, None, batch.cu_seqlens)
        targets = next_tokens(batch.labels, batch.cu_seqlens)
        with model.whole_head() as head:
            sums = head.part_losses(hidden, targets, model.config.vocab_size, labels)
        (sums / sums.new_tensor([totals[name] for name in parts])).sum().backward()
    return dict(zip(parts, sums.detach().unbind(), strict=True))
