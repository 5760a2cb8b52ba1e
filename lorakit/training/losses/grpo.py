"""The losses of GRPO and its relatives, of completions that rewards have graded.

A is the advantage of a completion, and rho = p / p_old says for each of its tokens how much
likelier it has become since it was sampled.

    grpo     (arXiv:2402.03300)   l = -min(rho A, clip(rho, 1 - e, 1 + e_high) A),
                                  the mean over the tokens of each completion
    dr_grpo  (arXiv:2503.20783)   l, summed, over completions * the largest length
    dapo     (arXiv:2503.14476)   l, the mean over all tokens of the step
    cispo    (arXiv:2506.13585)   -min(rho, e_high) A log p, the mean over all tokens of the step;
                                  the weight before log p has no gradient
    gspo     (arXiv:2507.18071)   l of rho = exp(mean(log p - log p_old)) of the whole completion

To each token's loss comes beta times an estimate of the distance from a reference, the model as it
was before the first step (Schulman 2020, "k3"):

    k3 = exp(log p_ref - log p) - (log p_ref - log p) - 1

Formulas, names and clipping are those of TRL 1.16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError, nearest
from lorakit.config.grpo import LOSS_TYPES, LossType


class GrpoLoss(NamedTuple):
    """What `grpo_loss` returns.

    Attributes:
        losses: The loss of each completion, fp32 [B]: the sum over its tokens, for "grpo" and
            "gspo" their mean.
        clipped: Which tokens have no gradient, or a smaller one, since their ratio is clipped:
            bool [B, T].
        distance: The sum of k3 over the tokens that count, []; 0 without a reference.
    """

    losses: Tensor
    clipped: Tensor
    distance: Tensor


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: LossType = "dapo",
    epsilon: float = 0.2,
    highest: float = 1.2,
    beta: float = 0.0,
    reference_logps: Tensor | None = None,
) -> GrpoLoss:
    """Return the loss of each completion; see the module for the formulas.

    Args:
        logps: The log-probabilities of the tokens of completions, [B, T], with gradient.
        old_logps: Those that they were sampled with, [B, T].
        advantages: How much better each completion is than others of its prompt, [B].
        mask: Which tokens count, bool [B, T].
        loss_type: "grpo", "dr_grpo", "dapo", "cispo" or "gspo".
        epsilon: e; ratios below 1 - e are clipped.
        highest: 1 + e_high, the number that ratios above it are clipped to; of cispo, e_high.
        beta: The weight of the distance from the reference.
        reference_logps: The log-probabilities under the reference, [B, T]; None without one.

    Returns:
        The losses and what was clipped. A step divides the sum of the losses by `divisor`.

    Raises:
        LorakitError: loss_type is none of these words, or beta is not 0 without a reference.
    """
    if loss_type not in LOSS_TYPES:
        raise LorakitError(f"loss_type is {loss_type!r}{nearest(loss_type, LOSS_TYPES)}")
    if beta and reference_logps is None:
        raise LorakitError("grpo_loss: beta needs the log-probabilities of the reference")
    counts = mask.float()
    lengths = counts.sum(-1).clamp(min=1)
    change, advantages = logps - old_logps, advantages[:, None]
    if loss_type == "gspo":
        change = ((change * counts).sum(-1) / lengths)[:, None]
    ratio = change.exp()
    above = (ratio > highest) & (advantages > 0)
    if loss_type == "cispo":
        clipped, losses = above, -ratio.clamp(max=highest).detach() * advantages * logps
    else:
        clipped = above | ((ratio < 1 - epsilon) & (advantages < 0))
        within = ratio.clamp(1 - epsilon, highest)
        losses = -torch.min(ratio * advantages, within * advantages)
    distance = logps.new_zeros(())
    if reference_logps is not None:
        behind = reference_logps - logps
        each = behind.exp() - behind - 1
        losses = losses + beta * each
        distance = (each.detach() * counts).sum()
    summed = (losses * counts).sum(-1)
    if loss_type in ("grpo", "gspo"):
        summed = summed / lengths
    return GrpoLoss(summed, clipped.expand_as(mask) & mask, distance)


def divisor(loss_type: LossType, completions: int, tokens: int, longest: int) -> int:
    """Return what the summed losses of a step are divided by.

    Args:
        loss_type: As `grpo_loss` takes it.
        completions: The number of completions of the step.
        tokens: The number of their tokens that count.
        longest: The most tokens that a completion may have.
    """
    if loss_type in ("grpo", "gspo"):
        return completions
    return completions * longest if loss_type == "dr_grpo" else max(tokens, 1)
