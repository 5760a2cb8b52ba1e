"""A causal convolution of every channel by itself, and SiLU: the short memory of a delta net.

    s_tc = sum_j w_cj x_(t-K+1+j)c        y = s sigmoid(s)        j = 0 .. K-1

What lies before a row is zero, or the last K - 1 inputs of the call before. Packed documents
(`lengths`) have zeros before each of them. Sums are in fp32 and rounded once.
"""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from ... import dispatch
from . import cpu

MOST = 8  # columns of the weight in the Triton kernels, which take them one after the other


def causal_conv(
    x: Tensor,
    weight: Tensor,
    *,
    state: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Convolve each channel with its weights over the tokens so far, and apply SiLU.

    Differentiable in x and weight. It is the convolution of arXiv:2412.06464, section 3.4.

    Args:
        x: [B, T, C], any floating-point dtype.
        weight: [C, K]; its last column meets the token itself.
        state: the K - 1 inputs before x, [B, K-1, C], without gradient. None for zeros.
        lengths: the tokens of each document packed along T, B == 1.

    Returns:
        [B, T, C] in x's dtype.

    Raises:
        ValueError: the lengths do not add up to T, or there are both lengths and a state.
    """
    check_documents(x, state, lengths)
    if dispatch.traces():
        return dispatch.traced().causal_conv(x, weight, state, lengths)
    return _module(x, weight).causal_conv(x, weight, state, lengths)


def kernel(x: Tensor, weight: Tensor) -> str:
    """Name what `causal_conv` runs on such tensors: "cpu", "triton" or "reference"."""
    return _module(x, weight).__name__.rpartition(".")[2]


def _module(x: Tensor, weight: Tensor) -> ModuleType:
    """Return the module of this folder that takes the operands."""
    tiles = x.dtype in dispatch.FLOATS and weight.shape[1] <= MOST and x.numel() > 0
    return dispatch.backend(__package__, x.device, cpu=cpu.fits(x, weight), triton=tiles)


def check_documents(x: Tensor, state: Tensor | None, lengths: Sequence[int] | None) -> None:
    """Raise ValueError unless `lengths` are those of documents in one row x that has no state."""
    if lengths is None:
        return
    if state is not None:
        raise ValueError("packed documents begin without a state; give lengths or a state")
    if len(x) != 1 or sum(lengths) != x.shape[1] or min(lengths, default=0) < 0:
        given = f"{len(x)} rows of {x.shape[1]} tokens"
        raise ValueError(f"the lengths {list(lengths)} do not add up to one row; there are {given}")
