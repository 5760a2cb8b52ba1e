"""The loss of a batch, by the objective of a run."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit import kernels
from lorakit.config.objectives import HEADED
from lorakit.config.training import TrainConfig
from lorakit.data.batching import batches, collate, real_tokens
from lorakit.data.encode import (
    IGNORE,
    AnyExample,
    Example,
    JudgedExample,
    LabelledExample,
    PairExample,
    count_labels,
)
from lorakit.data.examples import Examples
from lorakit.data.packing import collate_packed
from lorakit.models.classifier import classifier_in, last_tokens
from lorakit.models.decoder import Decoder
from lorakit.training.losses.classification import HeadBatch, head_loss, targets_of
from lorakit.training.losses.graded import GradedBatch, graded_loss
from lorakit.training.losses.preference import pair_losses
from lorakit.training.losses.reference import (
    Reference,
    losses_of_reference,
    losses_without_gradient,
)
from lorakit.training.losses.teacher import TaughtBatch, Teacher, taught_loss
from lorakit.training.losses.unpaired import kto_loss, mismatched


class Batch(NamedTuple):
    """The tensors of a batch, as `Decoder.loss` takes them.

    Attributes:
        ids: int64 [B, T], on the model's device.
        labels: int64 [B, T], in host memory, where they can be counted.
        attention_mask: bool [B, T], on the model's device, or None where padding does not matter.
        cu_seqlens: int32 [n + 1], in host memory, of packed documents; else None.
        desirable: Of KTO: bool [B], on the model's device, whether each answer is a good one.
        mismatched: Of KTO: the batch of the same prompts with others' completions; see unpaired.py.
        graded: What belongs to completions that rewards have graded; else None.
        taught: What belongs to the rows of a teacher; else None.
        head: What a head for classes needs; else None.
    """

    ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    desirable: Tensor | None = None
    mismatched: "Batch | None" = None
    graded: GradedBatch | None = None
    taught: TaughtBatch | None = None
    head: HeadBatch | None = None

    @property
    def rows(self) -> dict[str, Tensor | None]:
        """What tells `Decoder.row_losses` where its rows are."""
        return {"attention_mask": self.attention_mask, "cu_seqlens": self.cu_seqlens}


def collated(model: Decoder, batch: Sequence[AnyExample], config: TrainConfig) -> Batch:
    """Return the tensors of a batch: of pairs, the answers chosen and then those rejected.

    What the device needs is on its way there. The host does not wait for it.
    """
    rows = [example.answers[0] for example in batch]
    if config.pairs:
        rows += [example.answers[1] for example in batch]
    found = _of_rows(model, rows, config.packing)
    if config.objective == "distillation":
        return found._replace(taught=TaughtBatch(rows))
    if config.objective in HEADED:
        return found._replace(head=_head_batch(model, batch, rows, config, found.ids))
    if config.objective != "kto":
        return found
    good = torch.tensor([isinstance(each, JudgedExample) and each.desirable for each in batch])
    others: Batch | None = None
    if config.form == "kto":
        others = _of_rows(model, mismatched(rows, config.max_seq_length), config.packing)
    desirable = kernels.dispatch.sent(good, model.device)
    return found._replace(desirable=desirable, mismatched=others)


def _head_batch(
    model: Decoder,
    batch: Sequence[AnyExample],
    rows: Sequence[Example],
    config: TrainConfig,
    ids: Tensor,
) -> HeadBatch:
    """Return where the head reads the rows of a batch, and what it is to tell."""
    head = classifier_in(model, "train").classifier
    stride = None if config.packing else ids.shape[1]
    last = last_tokens([row.input_ids for row in rows], model.config.pad_token_id, stride)
    if config.pairs:
        targets = torch.tensor([each.margin for each in batch if isinstance(each, PairExample)])
    else:
        labels = [head.target(each.label) for each in batch if isinstance(each, LabelledExample)]
        targets = targets_of(head, labels)
    return HeadBatch(*(kernels.dispatch.sent(t, model.device) for t in (last, targets)))


def _of_rows(model: Decoder, rows: Sequence[Example], packing: bool) -> Batch:
    bounds: Tensor | None = None
    mask: Tensor | None = None
    if packing:
        ids, labels, bounds = collate_packed(rows)
    else:
        ids, labels = collate(rows)
        if model.config.by_length:
            mask = kernels.dispatch.sent(real_tokens(rows), model.device)
    return Batch(kernels.dispatch.sent(ids, model.device), labels, mask, bounds)


def summed_loss(
    model: Decoder,
    batch: Batch,
    config: TrainConfig,
    reference: Reference | Teacher | None,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a batch, and its number of label tokens.

    With objectives of preference the second number is how many rows the model has the right way
    round, or of completions how many there are. DPO and KTO compare with `reference`, as
    `pair_losses` takes it, and distillation with the teacher that it is. With sft the `statistics`
    of `kernels.cross_entropy` are added up.
    """
    smoothing = config.label_smoothing_factor
    if config.objective == "sft":
        return model.loss(
            batch.ids,
            batch.labels,
            **batch.rows,
            label_smoothing=smoothing,
            z_loss=config.z_loss,
            dft=config.form == "dft",
            statistics=statistics,
        )
    if isinstance(reference, Teacher):
        assert batch.taught is not None  # the objective is distillation
        loss = taught_loss(model, batch.ids, batch.labels, batch.rows, batch.taught, reference)
        return loss, (batch.labels[:, 1:] != IGNORE).sum()
    if batch.head is not None:
        return head_loss(model, batch.ids, batch.head, config, **batch.rows)
    if config.objective == "kto":
        losses, right = _judged_losses(model, batch, config, reference)
        return losses.sum(), right.sum()
    if batch.graded is not None and config.grpo is not None:
        loss = graded_loss(
            model, batch.ids, batch.labels, batch.graded, config.grpo, reference, **batch.rows
        )
        return loss, batch.labels.new_tensor(len(batch.graded.mask))
    losses, prefers = pair_losses(
        model,
        batch.ids,
        batch.labels,
        objective=config.objective,
        beta=config.beta,
        label_smoothing=smoothing,
        loss_type=config.form or "sigmoid",
        gamma=config.simpo_gamma,
        **batch.rows,
        reference=reference,
    )
    return losses.sum(), prefers.sum()


def _judged_losses(
    model: Decoder, batch: Batch, config: TrainConfig, reference: Reference | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of each good or bad answer, and whether it lies on its side of z."""
    assert batch.desirable is not None  # those of KTO
    # what has no gradient goes first, before the graph of the policy takes memory
    before = losses_of_reference(model, reference, batch.ids, batch.labels, batch.rows)
    divergence = torch.zeros((), device=before.device)
    other = batch.mismatched
    if other is not None:
        theirs = losses_of_reference(model, reference, other.ids, other.labels, other.rows)
        ours = losses_without_gradient(model, other.ids, other.labels, other.rows)
        divergence = (theirs - ours).mean().clamp(min=0)
    found, _ = model.row_losses(batch.ids, batch.labels, **batch.rows)
    losses = kto_loss(
        -found,
        -before,
        batch.desirable,
        divergence=divergence,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    return losses, (before - found > divergence) == batch.desirable


def row_logprobs(
    model: Decoder, rows: Sequence[AnyExample], config: TrainConfig, temperature: float = 1.0
) -> list[Tensor]:
    """Return the log-probabilities, fp32 [n], of the n label tokens of each row of a batch.

    The rows have one answer. `temperature` divides the logits.
    """
    batch = collated(model, rows, config)
    losses = model.token_losses(
        batch.ids,
        batch.labels,
        attention_mask=batch.attention_mask,
        cu_seqlens=batch.cu_seqlens,
        temperature=temperature,
    )
    return list((-losses).split([count_labels(row) for row in rows]))


def padded_batches(
    model: Decoder, examples: Examples, config: TrainConfig
) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of the first epoch in padded batches; of a pair the chosen answer."""
    lengths = examples.lengths
    for rows in batches(lengths, config.rows_at_a_time, config.seed, 0):
        chosen = [examples[row].answers[0] for row in rows]
        ids, mask = collate(chosen)[0], real_tokens(chosen)
        yield {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
