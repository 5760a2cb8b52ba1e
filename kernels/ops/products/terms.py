"""What is multiplied and added up: see the package."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..nf4 import NF4Tensor


class Term(NamedTuple):
    """a bf16 [M, depth], depth even, times b, bf16, fp32 or NF4 [depth, N], or [N, depth] if
    `turned`. A b that is less deep has zeros behind it.
    """

    a: Tensor
    b: Tensor | NF4Tensor
    turned: bool
    factor: float = 1.0  # of an fp32 b


class Sum(NamedTuple):
    """What goes to `out` [M, N], bf16 or fp32, whose rows may lie apart."""

    terms: Sequence[Term]
    out: Tensor
    scale: float = 1.0
    bias: Tensor | None = None  # fp32 [N]
