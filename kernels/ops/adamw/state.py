"""What the 8-bit state of a tensor consists of, and the two maps that its codes index.

A code is the index of a level; the levels ascend. Between two of them lies an edge, their midpoint
rounded to fp32 once, and code i stands for what lies in (edges[i], edges[i + 1]].
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..nf4.tensor import dynamic_map

BLOCK = 256  # values that share one absmax (bitsandbytes)


class Moment8bit(NamedTuple):
    """A moment of a tensor of n values, in its row-major order: exp_avg or exp_avg_sq."""

    codes: Tensor
    """uint8 [n]"""
    absmax: Tensor
    """fp32 [ceil(n / 256)]"""

    @classmethod
    def zeros(cls, n: int, device: torch.device) -> "Moment8bit":
        """Nothing seen yet: absmax 0 makes every code 0."""
        codes = torch.zeros(n, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(-(-n // BLOCK), dtype=torch.float32, device=device))


class Map(NamedTuple):
    """levels fp32 [256]; edges fp32 [256], of which the first is -inf."""

    levels: Tensor
    edges: Tensor


@functools.cache
def signed_map(device: torch.device) -> Map:
    """Of exp_avg: the dynamic map that double quantization has too."""
    levels = dynamic_map(device)
    return Map(levels, _edges(levels))


@functools.cache
def unsigned_map(device: torch.device) -> Map:
    """Of exp_avg_sq, which is never negative: the bit of the sign halves every step.

    For decade i = 0..6 the interval [0.1, 1] * 10^(i-6) is cut into 2^(i+1) equal parts whose
    centres are levels; 0 and 1 complete the 256. The first edge is 0 and no midpoint, so that only
    0 has the code of 0.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (decade + 1) + 1, dtype=torch.float32, device="cpu")
        values += (10.0 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)).tolist()
    levels = torch.tensor(sorted(values), dtype=torch.float32, device=device)
    edges = _edges(levels)
    edges[1] = 0
    return Map(levels, edges)


def _edges(levels: Tensor) -> Tensor:
    return torch.cat([levels.new_tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2])
