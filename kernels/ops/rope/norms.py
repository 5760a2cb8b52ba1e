"""What a kernel needs to know of the norm of the heads."""

from typing import NamedTuple

from torch import Tensor


class HeadNorms(NamedTuple):
    """The norms of q's and k's heads; the weights are frozen."""

    weights: tuple[Tensor, Tensor]  # [D], q's and k's
    eps: float
    offset: float
    casting_mode: str
