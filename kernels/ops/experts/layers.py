"""One layer of all experts: what the kernels take, and how its packed weights become dense.

Each expert keeps its weight in memory of its own, packed or dense. A product takes them as

    dense     where they are, by a table of their addresses
    NF4       made dense side by side, [E, N, K], in one launch that reads them by their addresses
    int8      put side by side, and made dense

At most WORKSPACE bytes of packed weights are dense at a time: a layer of more goes through the
product some experts at a time. How many is known from shapes alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from ..frozen_linear.dense import Packed
from ..int8 import Int8Tensor, dequantize_int8
from ..nf4 import NF4Tensor, addressed, dequantize_nf4_each

WORKSPACE = 1 << 30
ALIGNMENT = 16  # bytes, of a dense weight


@dataclass(frozen=True, eq=False)
class ExpertLayers:
    """One layer of every expert of a mixture, with its low-rank update (arXiv:2106.09685).

    Attributes:
        stored: W [N, K] of each expert, frozen, as it is stored.
        lora_A: A [r, K] of each expert; empty if they have no update.
        lora_B: B [N, r] of each expert.
        scaling: s, what every B A is multiplied by.
        bias: the bias [N] of each expert, frozen; empty if they have none.
    """

    stored: Sequence[Tensor | Packed]
    lora_A: Sequence[Tensor] = ()
    lora_B: Sequence[Tensor] = ()
    scaling: float = 1.0
    bias: Sequence[Tensor] = ()

    @cached_property
    def uniform(self) -> bool:
        """Whether they differ in values alone, and can be read by addresses."""
        first = _kind(self.stored[0])
        if first is None or any(_kind(w) != first for w in self.stored):
            return False
        small = self.lora_A, self.lora_B, self.bias
        return all(len({(t.shape, t.dtype, t.device) for t in of_all}) <= 1 for of_all in small)


class Groups(NamedTuple):
    """The picks of all tokens, sorted by expert: row i of the M = n k rows is pick order[i]."""

    order: Tensor  # int64 [M]
    tokens: Tensor  # int64 [M], the token of each row
    places: Tensor  # int64 [n, k], the row of each pick
    bounds: Tensor  # int32 [E + 1], where the rows of each expert begin


def grouped(picked: Tensor, experts: int) -> Groups:
    """Return the groups of picked int64 [n, k]; the host reads nothing from the device."""
    picks, order = picked.flatten().sort(stable=True)
    number = torch.arange(len(order), device=picked.device)
    places = torch.empty_like(order).scatter_(0, order, number).view(picked.shape)
    each = torch.arange(experts + 1, device=picked.device)
    bounds = torch.searchsorted(picks, each, out_int32=True)
    return Groups(order, order // picked.shape[1], places, bounds)


def takes(x: Tensor, layers: ExpertLayers) -> bool:
    """Return whether the kernels take these layers of all experts, in products of x's dtype."""
    dense = isinstance(layers.stored[0], Tensor)
    return layers.uniform and (not dense or layers.stored[0].dtype == x.dtype)


def _kind(w: Tensor | Packed) -> tuple | None:
    """Return what the weights of all experts must have in common; None: it is not taken."""
    if isinstance(w, NF4Tensor):
        kind = w.shape, w.block_size, w.dtype, w.quant_type, w.double_quant, w.device
        return kind if addressed(w) else None
    if isinstance(w, Int8Tensor):
        return w.shape, w.device
    whole = w.is_contiguous() and w.data_ptr() % ALIGNMENT == 0
    return (w.shape, w.dtype, w.device) if whole else None


def weights(
    stored: Sequence[Tensor | Packed], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some experts, and their weights [count, N, K] or the addresses of these, int64."""
    first = stored[0]
    if isinstance(first, Tensor):
        addresses = tuple(dispatch.address(w) for w in stored if isinstance(w, Tensor))
        yield slice(0, len(stored)), dispatch.address_table(addresses, first.device)
        return
    N, K = first.shape
    step = max(1, WORKSPACE // max(1, N * K * dtype.itemsize))
    for start in range(0, len(stored), step):
        some = stored[start : start + step]
        yield slice(start, start + len(some)), _dense(some, dtype)


def _dense(packed: Sequence[Tensor | Packed], dtype: torch.dtype) -> Tensor:
    """Return packed weights of one kind, dense and side by side, [count, N, K]."""
    in_4_bits = [q for q in packed if isinstance(q, NF4Tensor)]
    if in_4_bits:
        return dequantize_nf4_each(in_4_bits, dtype)
    in_8_bits = [q for q in packed if isinstance(q, Int8Tensor)]
    values = torch.cat([q.values for q in in_8_bits])
    scale = torch.cat([q.scale for q in in_8_bits])
    return dequantize_int8(Int8Tensor(values, scale, dtype)).view(len(packed), *in_8_bits[0].shape)
