"""Dropout whose mask is a function of a seed, a counter and the place of each value.

    d(x)_i = x_i / (1 - p)  if w_i < 2^32 (1 - p),  else 0

w_i is 32 random bits from Philox4x32-10 (Salmon et al., SC 2011), a cipher: the seed is its key,
the counter and i are what it enciphers. So backward and gradient checkpointing draw the mask again
from the same two numbers, and no generator has a state. The counter is read from the device: a CUDA
graph holds the launch, and whoever replays it writes another counter for another mask.

A call of Philox gives four words. In each block of 4 LANES values, of x row by row, call q makes
those at q, q + LANES, q + 2 LANES and q + 3 LANES: a program of a GPU then writes whole lines of
memory. There are 2^34 values at most.
"""

from torch import Tensor

from ... import dispatch


def seeded_dropout(x: Tensor, rate: float, seed: int, counter: Tensor) -> Tensor:
    """Return x with the share `rate` of it zero, and the rest over 1 - rate.

    Not differentiable: the gradient is the same function of the gradient.

    Args:
        x: of any shape and floating-point dtype, up to 2^34 values.
        rate: p, from 0 to below 1.
        seed: from 0 to 2^64 - 1.
        counter: int64 [], where x lies.

    Returns:
        d(x), contiguous, of the shape and dtype of x.
    """
    module = dispatch.backend(__package__, x.device, cpu=False, triton=x.dtype in dispatch.FLOATS)
    return module.dropout(x.contiguous(), threshold(rate), 1 / (1 - rate), seed, counter)


def threshold(rate: float) -> int:
    """Return 2^32 (1 - rate), below which a word keeps its value."""
    return min(round((1 - rate) * 2**32), 2**32 - 1)
