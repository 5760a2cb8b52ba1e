"""Sampling: how the next token is picked from logits.

A token is drawn from logits z by these steps, in the order that transformers and vLLM have too:

    z_i = -inf                  for the tokens i that a constraint forbids
    z_i / penalty where z_i > 0, else z_i * penalty, for the tokens i that the row holds
                                                                       (arXiv:1909.05858)
    z_i - c_i frequency - [c_i > 0] presence, where c_i counts i among the new tokens
                         (https://platform.openai.com/docs/guides/text-generation, "penalties")
    z_i + bias_i
    p = softmax(z / temperature)
    of p, the top_k likeliest tokens,
    of these, the fewest that hold top_p of their mass                 (arXiv:1904.09751)
    of these, the tokens with p_i >= min_p max(p)                      (arXiv:2407.01082)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.config.errors import LorakitError
from lorakit.inference.grammar import Constraint


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
    frequency_penalty: float = 0.0
    """What each use of a token in the new text takes off its logit."""
    presence_penalty: float = 0.0
    """What is taken off the logits of all tokens that the new text has."""

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
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise LorakitError(f"generate: {name} must be in [-2, 2]")


class Picker:
    """Picks the tokens of one row, by its settings and by the tokens that it has so far."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device,
        *,
        seed: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        constraint: Constraint | None = None,
        ends: Sequence[int] = (),
    ):
        """Begin a row.

        Args:
            sampling: How a token is picked.
            prompt: The token ids of the row so far.
            vocab_size: V, the number of logits.
            device: Where the logits lie.
            seed: Seed of the draws; None takes torch's global generator.
            logit_bias: What is added to the logits of some tokens, by their ids.
            constraint: Says which tokens may come next; None: all may.
            ends: The tokens that end a text, which a constraint allows where the text may end.

        Raises:
            LorakitError: The seed is none, or a bias is no number or for no token of the model.
        """
        self.sampling, self.constraint, self.ends = sampling, constraint, list(ends)
        self.vocab_size, self.device = vocab_size, device
        self.generator = generator_of(seed, device)
        self.bias = _bias(logit_bias, vocab_size, device)
        self.seen: Tensor | None = None  # by the prompt or the new text
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(1, vocab_size, dtype=torch.bool, device=device)
            self.seen[0, list(prompt)] = True
        self.uses: Tensor | None = None  # in the new text
        if sampling.frequency_penalty or sampling.presence_penalty:
            self.uses = torch.zeros(1, vocab_size, device=device)

    def pick(self, logits: Tensor) -> int:
        """Pick the next token from the row's logits [1, V], and remember it.

        Raises:
            LorakitError: If the largest logit is not finite.
        """
        if self.constraint is not None:
            logits = logits.masked_fill(~self._allowed(), -math.inf)
        if self.seen is not None:
            logits = _less_likely(logits, self.sampling.repetition_penalty, self.seen)
        if self.uses is not None:
            logits = logits - self.sampling.frequency_penalty * self.uses
            logits = logits - self.sampling.presence_penalty * (self.uses > 0)
        if self.bias is not None:
            logits = logits + self.bias
        token = int(draw(logits, self.sampling, self.generator))
        if self.seen is not None:
            self.seen[0, token] = True
        if self.uses is not None:
            self.uses[0, token] += 1
        if self.constraint is not None and token not in self.ends:
            self.constraint.take(token)
        return token

    def _allowed(self) -> Tensor:
        """Return which tokens may come next: bool [V]."""
        constraint = self.constraint
        assert constraint is not None
        known = constraint.allowed()[: self.vocab_size]
        allowed = torch.zeros(self.vocab_size, dtype=torch.bool)
        allowed[: len(known)] = known
        allowed[self.ends] = constraint.complete
        return allowed.to(self.device)

    @property
    def ended(self) -> bool:
        """Whether a constraint lets nothing follow."""
        return self.constraint is not None and self.constraint.ended


def _bias(
    given: Mapping[int, float] | None, vocab_size: int, device: torch.device
) -> Tensor | None:
    """Return biases [1, V]; None for none."""
    if not given:
        return None
    for token, value in given.items():
        if not 0 <= token < vocab_size or not -100 <= value <= 100:
            raise LorakitError(
                f"generate: logit_bias has {value!r} for token {token!r}; tokens must be in "
                f"[0, {vocab_size}), biases in [-100, 100]"
            )
    bias = torch.zeros(1, vocab_size)
    bias[0, list(given)] = torch.tensor(list(given.values()), dtype=torch.float32)
    return bias.to(device)


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None, seen: Tensor | None
) -> Tensor:
    """Pick a token for each row of logits; the penalties that count new tokens are `Picker`'s.

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
        logits = _less_likely(logits, sampling.repetition_penalty, seen)
    return draw(logits, sampling, generator)


def _less_likely(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Return the logits, lower by a factor for the tokens that were seen."""
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lower, logits)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Draw a token for each row of logits [B, V], which the penalties have changed already.

    Args:
        logits: [B, V]; minus infinity for a token that may not be drawn.
        sampling: How a token is picked.
        generator: Source of random numbers; None takes torch's global one.

    Returns:
        Token ids, int64 [B].

    Raises:
        LorakitError: If the largest logit of a row is not finite.
    """
    top, token = logits.max(-1, keepdim=True)
    if not top.isfinite().all():
        raise LorakitError("generate: the model's logits are not finite")
    if sampling.temperature < 1e-30:  # as good as 0, which in fp32 it may even become
        return token[:, 0]
    logits = logits - top  # a tiny temperature must not give inf - inf
    tokens: Tensor | None = None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, tokens = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, tokens = logits.sort(descending=True, stable=True)
    probs = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs  # the mass of likelier tokens
        probs[before >= sampling.top_p] = 0
    if sampling.min_p > 0:
        probs[probs < sampling.min_p * probs.amax(-1, keepdim=True)] = 0
    drawn = _drawn(probs, generator)
    return (drawn if tokens is None else tokens.gather(-1, drawn))[:, 0]


def _drawn(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a place for each row of probabilities [B, V], in the share of their sum: int64 [B, 1].

    A row takes one random number, and the first place at which the sum so far is above it.
    `torch.multinomial` takes one for each of the V places.
    """
    sums = probs.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    shape = (len(probs), 1)
    at = torch.rand(shape, generator=generator, dtype=torch.float64, device=probs.device) * total
    # the product may be rounded up to the total, above which there is no place
    at = torch.minimum(at, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, at, right=True)


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
