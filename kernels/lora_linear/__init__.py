"""A linear layer with a low-rank update (LoRA, arXiv:2106.09685), with a backward derived by hand.

The maths
---------
With x [M, K], a frozen base weight W [N, K], A [r, K], B [N, r], and s = alpha / r:

    y  = x W^T + s (x A^T) B^T
    dx = dy W + s (dy B) A
    dA = s (dy B)^T x
    dB = s dy^T (x A^T)

Every product with A or B has a side of length r: no N x K update is ever formed, in either
direction. With dropout the update reads a dropped copy of x; dA and dB then use that copy, and its
own gradient is s (dy B) A.

What is kept
------------
Only the input of the update and the two small matrices. W is asked of the base when it is needed (a
4-bit base dequantizes it again), and x A^T is recomputed: r / N of the layer's product, instead of
M r kept values.

The base is any callable with `dequantize()`: the op does not know, and need not, how the weight is
stored.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from . import reference


class Base(Protocol):
    """A frozen linear map: base(x) = x W^T (+ bias), and its W."""

    def __call__(self, x: Tensor) -> Tensor: ...

    dequantize: Callable[[], Tensor]  # -> W [N, K], in the compute dtype


def lora_linear(
    x: Tensor,
    base: Base,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropped: Tensor | None = None,
) -> Tensor:
    """base(x) + scaling (x A^T) B^T for x [..., K], A [r, K], B [N, r]: [..., N] in x's dtype.

    `dropped` [..., K] is what the update reads instead of x (x after dropout). Differentiable in x,
    dropped, A and B; the base is frozen: a gradient for its weight is not computed.
    """
    return reference.LoraLinearFunction.apply(x, dropped, lora_A, lora_B, base, scaling)
