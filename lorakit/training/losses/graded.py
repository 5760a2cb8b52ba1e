"""The loss of a batch of completions that rewards have graded.

The old log-probabilities are the trainer's own, of the first step that learns from a completion. So
every ratio of that step is exactly 1, whatever kernels have sampled. How far the sampler's are from
them is measured, and told by the run.
"""

import torch
from torch import Tensor

from lorakit.config.grpo import GrpoConfig
from lorakit.models.decoder import Decoder
from lorakit.training.losses.grpo import grpo_loss
from lorakit.training.losses.reference import Reference
from lorakit.training.mode import evaluation_mode

TOLD = ("kl", "clip_ratio", "entropy", "sampling_logp_difference", "sampling_logp_difference_max")
"""What `GradedBatch.told` holds: sums over the learned tokens, and of the last a maximum."""


class GradedBatch:
    """What belongs to the tokens of completions, [B, T], the longest of which has T.

    Args:
        mask: Which tokens are there, bool [B, T], on the model's device.
        counts: Which of them are learned, bool [B, T], there.
        advantages: The advantage of each completion, fp32 [B], there.
        sampled: The sampler's log-probabilities, fp32 [B, T], there.
        old: The trainer's own at the first step, or None before it.
    """

    def __init__(
        self,
        mask: Tensor,
        counts: Tensor,
        advantages: Tensor,
        sampled: Tensor,
        old: Tensor | None = None,
    ):
        self.mask, self.counts, self.advantages = mask, counts, advantages
        self.sampled, self.old = sampled, old
        self.reference: Tensor | None = None
        self.told: Tensor | None = None  # of the last step, fp32 [len(TOLD)]

    def padded(self, losses: Tensor) -> Tensor:
        """Return log-probabilities [B, T], 0 at padding, from the losses [n] of all tokens."""
        empty = losses.new_zeros(self.mask.shape)
        return empty.masked_scatter(self.mask, -losses)

    def note(self, logps: Tensor, clipped: Tensor, distance: Tensor) -> None:
        """Keep what the run tells of a step."""
        assert self.old is not None  # with which the sampler's are compared, as long as it lasts
        apart = (self.old - self.sampled).abs() * self.counts
        sums = distance, clipped.sum(), -(logps * self.counts).sum(), apart.sum(), apart.max()
        self.told = torch.stack([each.detach().float() for each in sums])


def graded_loss(
    model: Decoder,
    ids: Tensor,
    labels: Tensor,
    graded: GradedBatch,
    settings: GrpoConfig,
    reference: Reference | None,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return the summed loss of completions, fp32 []; see grpo.py for what divides it.

    Args:
        model: The model.
        ids: int64 [B, T'], prompts with their completions, padded or packed.
        labels: The same shape, -100 but at the tokens of completions.
        graded: What belongs to the completions; it keeps the old log-probabilities.
        settings: The settings of the loss.
        reference: What the distance is measured from; None without beta.
        attention_mask: As `Decoder.loss` takes it.
        cu_seqlens: As `Decoder.loss` takes it.
    """

    def now() -> Tensor:
        losses = model.token_losses(
            ids,
            labels,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            temperature=settings.temperature,
        )
        return graded.padded(losses)

    if reference is not None and graded.reference is None:
        with reference.in_place(), evaluation_mode(model):
            graded.reference = now()
    logps = now()
    if graded.old is None:
        graded.old = logps.detach()
    found = grpo_loss(
        logps,
        graded.old,
        graded.advantages,
        graded.counts,
        loss_type=settings.loss_type,
        epsilon=settings.epsilon,
        highest=settings.highest,
        beta=settings.beta,
        reference_logps=graded.reference,
    )
    graded.note(logps.detach(), found.clipped, found.distance)
    return found.losses.sum()
