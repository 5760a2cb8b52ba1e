"""Sampling: how the next token is picked from logits.

A token is drawn from logits z by these steps, in the order that transformers has too:

    z_i / penalty where z_i > 0, else z_i * penalty, for the tokens i that the row holds
                                                                       (arXiv:1909.05858)
    p = softmax(z / temperature)
    of p, the top_k likeliest tokens,
    of these, the fewest that hold top_p of their mass                 (arXiv:1904.09751)
    of these, the tokens with p_i >= min_p max(p)                      (arXiv:2407.01082)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError


@dataclass(frozen=True)
class Sampling:
    """Settings of how a token is picked.

    Making one raises LorakitError for a value outside its range.
    """

    temperature: float = 0.0
    """Divisor of the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Number of the likeliest tokens that may be drawn; None means all."""
    top_p: float = 1.0
    """Share of the probability that the tokens which may be drawn hold together."""
    min_p: float = 0.0
    """Least probability of a token that may be drawn, as a share of the likeliest one's."""
    repetition_penalty: float = 1.0
    """Factor by which tokens that the row holds already become less likely; 1 is none."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise LorakitError("generate: temperature must be at least 0")
        if self.top_k is not None and self.top_k <= 0:
            raise LorakitError("generate: top_k must be at least 1, or None")
        if not 0 < self.top_p <= 1:
            raise LorakitError("generate: top_p must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise LorakitError("generate: min_p must be in [0, 1]")
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise LorakitError("generate: repetition_penalty must be in [1e-6, 1e6]")


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None, seen: Tensor | None
) -> Tensor:
    """Pick a token for each row of logits.

    Args:
        logits: [B, V].
        sampling: How a token is picked.
        generator: Source of random numbers; None takes torch's global one.
        seen: bool [B, V], the tokens that each row holds and that repetition_penalty applies to;
            None: there is no penalty.

    Returns:
        Token ids, int64 [B].

    Raises:
        LorakitError: If the largest logit of a row is not finite.
    """
    if seen is not None:
        penalty = sampling.repetition_penalty
        lower = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, lower, logits)
    top, token = logits.max(-1, keepdim=True)
    if not top.isfinite().all():
        raise LorakitError("generate: the model's logits are not finite")
    if sampling.temperature < 1e-30:  # as good as 0, which in fp32 it may even become
        return token[:, 0]
    logits = logits - top  # a tiny temperature must not give inf - inf
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, tokens = logits.topk(sampling.top_k)
    else:
        logits, tokens = logits.sort(descending=True, stable=True)
    probs = (logits / sampling.temperature).softmax(-1)
    before = probs.cumsum(-1) - probs  # the mass of likelier tokens
    probs[before >= sampling.top_p] = 0
    probs[probs < sampling.min_p * probs[:, :1]] = 0
    return tokens.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def generator_of(seed: int | None, device: torch.device) -> torch.Generator | None:
    """Return the generator of a seed; None for None, torch's global one.

    Raises:
        LorakitError: If the seed is not in [0, 2^63).
    """
    if seed is None:
        return None
    if not 0 <= seed < 2**63:
        raise LorakitError(f"generate: seed is {seed}; it must be in [0, 2^63)")
    return torch.Generator(device=device).manual_seed(seed)
