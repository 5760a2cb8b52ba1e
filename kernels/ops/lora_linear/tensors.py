"""What the layers of one input consist of, in the order that autograd hands it on."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ... import pretend
from ..dropout import seeded_dropout
from ..float8 import Float8Weight
from ..frozen_linear.dense import Packed

TENSORS = 4  # of an update: the fields of LoraTensors


class FrozenLinearMap(Protocol):
    """A frozen linear map: base(x) = x W^T + bias, in memory of its own, and its W."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [M, K] W^T + bias, [M, N]."""

    @property
    def stored(self) -> Tensor | Packed | Float8Weight:
        """W [N, K], as it is stored."""

    @property
    def bias(self) -> Tensor | None:
        """The bias [N], if there is one."""


StaticUpdate = tuple[FrozenLinearMap, float, slice | None]
"""What autograd does not see of an update: base, scaling, and the rows of x that it reads; None:
all. (A tuple is made without a call.)"""

Static = Sequence[StaticUpdate]  # those of one base follow each other


class LoraTensors(NamedTuple):
    """The tensors of an update that gradients are computed for, and its layer's bias."""

    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    bias: Tensor | None  # [N]
    magnitude: Tensor | None  # [N], DoRA's


def by_layer(tensors: Sequence[Any]) -> list[LoraTensors]:
    """Return the tensors of each update, of all that lie side by side."""
    return [LoraTensors(*tensors[i : i + TENSORS]) for i in range(0, len(tensors), TENSORS)]


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return a view of contiguous tensors of one shape as one tensor [n, ...].

    Return None unless they lie one after the other in one memory.
    """
    first = tensors[0]
    start, size = first.storage_offset(), first.numel()
    for i, t in enumerate(tensors):
        same = t.shape == first.shape and t.dtype == first.dtype and t.is_contiguous()
        if not same or t.storage_offset() != start + i * size:
            return None
        if not pretend.same_memory(t, first):
            return None
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


def widened(x: Tensor, columns: int) -> Tensor:
    """Return x [M, K] and the memory beside its rows, [M, columns].

    x is as it was for autograd, whatever is written beside it.
    """
    return x.data.as_strided((x.shape[0], columns), (columns, 1))


class Dropout(NamedTuple):
    """A mask that can be drawn again: from `seed`, or from seed and `counter` on the device."""

    rate: float
    seed: int
    counter: Tensor | None = None  # int64 []

    def __call__(self, x: Tensor) -> Tensor:
        """Return d(x): x with the share `rate` of it zero, and the rest over 1 - rate."""
        if self.rate == 0:
            return x
        if self.rate == 1:
            return torch.zeros_like(x)
        if self.counter is not None:
            return seeded_dropout(x, self.rate, self.seed, self.counter)
        generator = torch.Generator(x.device).manual_seed(self.seed)
        # row-major whatever the strides of x are: backward draws it again for another tensor
        mask = torch.empty_like(x, memory_format=torch.contiguous_format)
        mask.bernoulli_(1 - self.rate, generator=generator)
        return mask.mul_(x).mul_(1 / (1 - self.rate))
