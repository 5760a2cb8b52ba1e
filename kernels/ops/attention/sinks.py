"""Sinks: a score of each head that takes its share of the weights and has no value.

    o_i = sum_j e^s_ij v_j / (e^sink + sum_j e^s_ij) = y_i sigmoid(lse_i - sink)

y and lse = ln sum_j e^s_ij are those of attention without sinks. With lse' = ln(e^lse + e^sink),
the weights are e^(s - lse'), so that the backward pass of attention is right as it is, given o and
lse'. A sink is a key whose value is 0, so its gradient is - sum_i e^(sink - lse'_i) do_i . o_i.
"""

import math

import torch
from torch import Tensor


def with_sinks(
    y: Tensor, lse: Tensor, sinks: Tensor | None, *, base2: bool = False
) -> tuple[Tensor, Tensor]:
    """Return attention's output and log-sum with sinks, given those without.

    Args:
        y: [..., T, Hq, D]; the result is written over it.
        lse: fp32 [..., Hq, T]; infinite for a query that sees nothing, whose y is 0.
        sinks: [Hq]; None changes nothing.
        base2: whether lse is a logarithm to the base 2.

    Returns:
        y, and the log-sum in the same base.
    """
    if sinks is None:
        return y, lse
    unit = math.log(2) if base2 else 1.0
    sink, natural = sinks.float()[:, None], lse * unit
    y.mul_(torch.sigmoid(natural - sink).transpose(-1, -2).unsqueeze(-1))
    return y, torch.logaddexp(natural, sink) / unit


def sinks_gradient(
    dy: Tensor, y: Tensor, lse: Tensor, sinks: Tensor, *, base2: bool = False
) -> Tensor:
    """Return the gradient of sinks [Hq], given dy, and y and lse as `with_sinks` returned them."""
    unit = math.log(2) if base2 else 1.0
    share = torch.exp(sinks.float()[:, None] - lse * unit)  # [..., Hq, T]
    delta = (dy.float() * y.float()).sum(-1).transpose(-1, -2)
    rows = (share * delta).sum(-1)  # [..., Hq]
    return -rows.view(-1, len(sinks)).sum(0).to(sinks.dtype)
