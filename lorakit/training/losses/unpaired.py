"""KTO: the losses of completions that are good or bad, each on its own (arXiv:2402.01306).

    r = log p(y) - log p_ref(y)         the log-probabilities are summed over the tokens of y
    z = max(0, mean of r over the batch's completions, each after another row's prompt)
    loss = 1 - sigmoid(beta (r - z))    of a good (desirable) completion
           1 - sigmoid(beta (z - r))    of a bad one

z estimates how far the model is from its reference (reference.py), and has no gradient. The prompt
of each row gets the completion of the row before it in the batch, as in TRL; so z, and with it the
gradient, depends on which rows are computed together. It costs one more pass of the model and one
of the reference, without gradients. "apo_zero_unpaired" (arXiv:2408.06266) is the same with z = 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.data.encode import IGNORE, Example


def kto_loss(
    completions: Tensor,
    reference: Tensor,
    desirable: Tensor,
    *,
    divergence: Tensor | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the KTO loss of each completion (arXiv:2402.01306).

    Args:
        completions: The summed log-probabilities of the completions, [B].
        reference: Those under the reference model, [B].
        desirable: bool [B], whether each is a good one.
        divergence: How far the model is from its reference, z, in nats, without a gradient; 0 gives
            the form "apo_zero_unpaired".
        beta: How strongly the model is held to the reference, above 0.
        desirable_weight: The weight of good completions.
        undesirable_weight: The weight of bad ones.

    Returns:
        The losses, [B].

    Raises:
        LorakitError: beta is not positive.
    """
    if not beta > 0:
        raise LorakitError(f"beta must be positive, not {beta}")
    ahead = completions - reference - divergence
    losses = torch.sigmoid(-beta * torch.where(desirable, ahead, -ahead))
    return torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)


def mismatched(examples: Sequence[Example], longest: int) -> list[Example]:
    """Return the examples of a batch, each with the completion of the one before it.

    The prompt is what stands before the first label. The first gets the completion of the last.

    Args:
        examples: The examples of a batch.
        longest: The most tokens of a row; the end of a longer one is cut off.
    """
    parts = []
    for ids, labels in examples:
        first = next(t for t, label in enumerate(labels) if label != IGNORE)
        parts.append((ids[:first], ids[first:], labels[first:]))
    found = []
    for i, (prompt, _, _) in enumerate(parts):
        _, completion, learned = parts[i - 1]
        ids, labels = prompt + completion, [IGNORE] * len(prompt) + learned
        found.append(Example(ids[:longest], labels[:longest]))
    return found
