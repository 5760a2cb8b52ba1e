"""What the 8-bit state of a tensor consists of, and the two maps of its codes.

A code is the index of a level; the levels ascend. Between two of them lies an edge, their midpoint
rounded to fp32 once. Code i stands for the values in (edges[i], edges[i + 1]].
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..nf4.tensor import dynamic_map

BLOCK = 256  # values that share one absmax (bitsandbytes)


class Moment8bit(NamedTuple):
    """A moment of a tensor in 8 bits (arXiv:2110.02861): its exp_avg or its exp_avg_sq.

    The n values of the tensor are taken in row-major order.

    Attributes:
        codes: uint8 [n], the index of each value's level.
        absmax: fp32 [ceil(n / 256)], the largest magnitude of each block of 256 values.
    """

    codes: Tensor
    absmax: Tensor

    @classmethod
    def zeros(cls, n: int, device: torch.device) -> "Moment8bit":
        """Make the moment of a tensor before its first step: absmax 0 makes every value 0.

        Args:
            n: the number of values.
            device: where the moment lies.

        Returns:
            The moment, in new memory.
        """
        codes = torch.zeros(n, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(-(-n // BLOCK), dtype=torch.float32, device=device))


class Map(NamedTuple):
    """The levels of a code, and the edges between them.

    Attributes:
        levels: fp32 [256], ascending.
        edges: fp32 [256], of which the first is -inf.
    """

    levels: Tensor
    edges: Tensor


@functools.cache
def signed_map(device: torch.device) -> Map:
    """Return the map of exp_avg: the dynamic map that double quantization has too."""
    levels = dynamic_map(device)
    return Map(levels, _edges(levels))


@functools.cache
def unsigned_map(device: torch.device) -> Map:
    """Return the map of exp_avg_sq, which is never negative: the bit of the sign halves every step.

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
