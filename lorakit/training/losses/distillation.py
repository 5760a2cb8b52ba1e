"""Distillation: the divergence of a model from its teacher, token by token.

With the softmaxes q of the model and p of the teacher, both at temperature t, and m = beta p +
(1 - beta) q, the generalized Jensen-Shannon divergence (arXiv:2306.13649, equation 1) is

    D = beta KL(p || m) + (1 - beta) KL(q || m)

Its limits stand for the two ends: beta = 0 is the forward KL(p || q), the loss of Hinton et al.
(arXiv:1503.02531) but for its factor t^2, and beta = 1 the reverse KL(q || p). The loss of a run
mixes it with the plain one, of the labels at temperature 1:

    loss = (1 - alpha) D + alpha nll

Of a teacher whose k most likely tokens alone are known, with their probabilities, all others are
one outcome: k + 1 numbers, of the teacher as of the model, that sum to 1. By the inequality of data
processing their divergence is at most that of all tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.config.errors import check


def distillation_loss(
    student: Tensor, teacher: Tensor, *, beta: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """Return the divergence of each token from the teacher (arXiv:2306.13649).

    Args:
        student: The logits of the model, [..., V]; in 16 bits they are taken to fp32.
        teacher: Those of the teacher, of the same shape.
        beta: 0 for the forward KL divergence, 1 for the reverse one, between them for the
            generalized Jensen-Shannon divergence.
        temperature: The number that both are divided by, above 0.

    Returns:
        The divergences in nats, [...].

    Raises:
        LorakitError: beta or temperature is out of its range, or the shapes differ.
    """
    _check(beta, temperature)
    check(
        student.shape == teacher.shape,
        f"distillation_loss: the logits are {list(student.shape)} and {list(teacher.shape)}; both "
        "need one shape, and one vocabulary",
    )
    q, p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    return _divergence(q, p, beta)


def top_k_distillation_loss(
    student: Tensor,
    words: Tensor,
    log_probs: Tensor,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return the divergence of each token from a teacher of whom k tokens are known.

    Args:
        student: The logits of the model, [n, V]; in 16 bits they are taken to fp32.
        words: The teacher's k most likely tokens, int64 [n, k], all different in a row.
        log_probs: The logarithms of their probabilities at this temperature, and behind them that
            of the probability of all other tokens, [n, k + 1]; [n, k] if there is no other token.
        beta: As `distillation_loss` takes it.
        temperature: As `distillation_loss` takes it.

    Returns:
        The divergences in nats, [n].

    Raises:
        LorakitError: beta or temperature is out of its range.
    """
    _check(beta, temperature)
    has_others = log_probs.shape[-1] > words.shape[-1]
    known = known_of(log_softmax(student, temperature), words, with_others=has_others)
    return _divergence(known, log_probs.to(known.dtype), beta)


def known_of(log_probs: Tensor, words: Tensor, *, with_others: bool) -> Tensor:
    """Return the log-probabilities of k tokens, and behind them that of all others together.

    Args:
        log_probs: The log-probabilities of all tokens, [n, V].
        words: The tokens, int64 [n, k], all different in a row.
        with_others: Whether there are others, V > k.

    Returns:
        The log-probabilities, [n, k + 1]; without others [n, k].
    """
    known = log_probs.gather(-1, words)
    if not with_others:
        return known
    others = log_probs.scatter(-1, words, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([known, others], dim=-1)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of logits [..., V] at a temperature, in fp32; fp64 stays."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(wide if temperature == 1 else wide / temperature, dim=-1)


def _check(beta: float, temperature: float) -> None:
    check(0 <= beta <= 1, f"beta is {beta}; in distillation it must be in [0, 1]")
    check(temperature > 0, f"temperature must be positive, not {temperature}")


def _divergence(q: Tensor, p: Tensor, beta: float) -> Tensor:
    """Return the divergence of log-probabilities q of the model and p of the teacher, [...]."""
    if beta == 0:
        return _kl(p, q)
    if beta == 1:
        return _kl(q, p)
    mixture = torch.logaddexp(q + math.log1p(-beta), p + math.log(beta))
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)
