"""Next-token cross-entropy, summed over the labels that count; alone, and fused with the head.

With logits z and label y, in fp32,

    loss = logsumexp(z) - z_y          d loss / d z = softmax(z) - onehot(y)

A soft cap c (Gemma 2) replaces z by c tanh(z / c), of slope 1 - tanh^2(z / c).

Both functions return the sum and the number of labels that were not `ignore_index`, so
that a caller can add up micro-batches of different length and divide once: the mean of means weighs
short batches too much.

`linear_cross_entropy` takes the hidden states instead of the logits. The logits of a large
vocabulary are the biggest tensor of a training step (T x V x 4 bytes: 0.8 GB for 4096 tokens of a
49,152-word model), so it walks the rows in chunks of about 64 MB of logits and computes the
gradient in the forward pass, while a chunk's logits are at hand; backward only scales it. The cost:
a gradient is computed even if backward never runs, unless gradients are disabled.

A packed head (NF4 or int8) is dequantized some thousand rows of the vocabulary at a time, and the
dense head never exists: twice for every chunk, for the logits and for the gradient.
"""

import torch
from torch import Tensor

from ..frozen_linear import Packed
from . import reference


def cross_entropy(
    logits: Tensor, labels: Tensor, *, softcap: float | None = None, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """logits [..., V] before any soft cap, labels int64 [...] -> (summed loss fp32 [], count int64
    []).
    """
    return reference.cross_entropy(logits, labels, softcap, ignore_index)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Packed,
    labels: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of hidden [..., H] @ weight [V, H]^T, never building all the logits.

    labels: int64 [...]; rows whose label is `ignore_index` are left out before the product. Returns
    (summed loss fp32 [], count int64 []); differentiable in hidden and in a dense weight.
    """
    rows = (labels.reshape(-1) != ignore_index).nonzero()[:, 0]
    picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
    if isinstance(weight, Tensor) and not torch.is_grad_enabled():
        weight = weight.detach()  # no gradient while the logits are at hand, then
    total = reference.LinearCrossEntropy.apply(picked, weight, labels.reshape(-1)[rows], softcap)
    return total, (labels != ignore_index).sum()
