"""The terms of a sum, and the sum itself; `__init__.py` has the formula."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..nf4 import NF4Tensor


class Term(NamedTuple):
    """A product of two matrices, a [M, depth] and b [depth, N].

    a is bf16 or fp32, one of them in all sums of a call, and its depth even. b is bf16, fp32 or
    NF4, and rounded to a's dtype; if it is `turned` it lies as [N, depth]. A b that is less deep
    than a is continued by zeros. An a with fewer rows than the sum has those from `start` on, and
    the term counts for these alone.
    """

    a: Tensor
    b: Tensor | NF4Tensor
    turned: bool
    factor: float = 1.0  # of an fp32 b
    start: int = 0  # the row of the sum that a's first row belongs to


class Sum(NamedTuple):
    """A sum [M, N] that is written to `out`, to `turned`, or to both.

    They are bf16 or fp32, of one dtype, and their rows may lie apart.
    """

    terms: Sequence[Term]
    out: Tensor | None  # [M, N]
    scale: float = 1.0
    bias: Tensor | None = None  # fp32 [N]
    turned: Tensor | None = None  # [N, M]
