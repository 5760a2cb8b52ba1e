"""Low-rank updates of several adapters on one input, each on the rows of its own.

The rows of x [M, K] lie adapter after adapter. Adapter a has rows [i, j), its A_a [r_a, K] and
B_a [N, r_a]; ranks and scalings may differ. To y [M, N], what the frozen layer made of all rows in
one product, each adds

    y[i:j] += s_a (x[i:j] A_a^T) B_a^T

and in backward, for dy of its rows,

    dx += s_a (dy B_a) A_a      dA_a = s_a (dy B_a)^T x      dB_a = s_a dy^T (x A_a^T)

So the products with the frozen weight, which dominate, are those of one adapter with all rows, and
each update costs what it costs alone. Kept for backward are x, which the layers of one input share,
and r_a numbers a row.

There are two ways. Where the compiled kernel takes the layers (cpu.py), updates and frozen products
are the terms of one sum, in one call for all adapters and all layers of an input. An adapter then
gets the bits that it gets alone. Elsewhere `lora_spans` adds to what the frozen layer has made, by
torch's products, adapter by adapter, and they may sum in another order than alone. There the
updates are fp32 on a CPU, as A and B are. On a GPU they are in the dtype of x, and the gradients of
A and B are rounded to theirs once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch, pretend
from ...autograd import once_differentiable, without_autocast
from ..products import available
from . import cpu
from .tensors import FrozenLinearMap, Static, StaticUpdate


class LoraSpan(NamedTuple):
    """The update of one adapter, and its rows.

    Attributes:
        start: the first of its rows.
        end: the row after its last.
        lora_A: A [r, K].
        lora_B: B [N, r].
        scaling: what B A is multiplied by.
    """

    start: int
    end: int
    lora_A: Tensor
    lora_B: Tensor
    scaling: float


@final
@dataclass(frozen=True, eq=False)
class SpanWeights:
    """A base layer and the low-rank updates of several adapters, each of its own rows.

    Attributes:
        base: the frozen layer, base(x) = x W^T + bias, with its `stored` weight W [N, K].
        spans: the updates, at least one. Their rows do not overlap; the base alone computes others.
    """

    base: FrozenLinearMap
    spans: Sequence[LoraSpan]

    def static(self) -> list[StaticUpdate]:
        """Return what autograd does not see of each update."""
        return [(self.base, s.scaling, slice(s.start, s.end)) for s in self.spans]

    def tensors(self) -> list[Tensor | None]:
        """Return what autograd sees of each update, side by side; the first has the bias."""
        found = [t for s in self.spans for t in (s.lora_A, s.lora_B, None, None)]
        found[2] = self.base.bias
        return found


def in_sums(x: Tensor, static: Static, tensors: Sequence[Tensor | None]) -> bool:
    """Return whether x [M, K] goes through layers of one input as sums of products; see cpu.py."""
    return not dispatch.traces() and available(x) and cpu.takes_updates(x, static, tensors)


def by_itself(x: Tensor, layer: SpanWeights) -> Tensor:
    """Return what a layer makes of x [M, K], [M, N]: its base, and then the updates."""
    return lora_spans(x, layer.base(x), layer.spans)


def lora_spans(x: Tensor, y: Tensor, spans: Sequence[LoraSpan]) -> Tensor:
    """Add to y the low-rank updates (arXiv:2106.09685) of several adapters, each to its own rows.

    Differentiable in x, y, and every A and B.

    Args:
        x: [M, K], what the layer has read.
        y: [M, N] in the dtype of x, what it has returned; it is written to.
        spans: the updates. Their rows do not overlap; rows of none stay.

    Returns:
        y [M, N].
    """
    if not spans:
        return y
    places = [(each.start, each.end, each.scaling) for each in spans]
    tensors = [t for each in spans for t in (each.lora_A, each.lora_B)]
    return LoraSpans.apply(y, x, places, *tensors)


class LoraSpans(torch.autograd.Function):
    """Add updates to y [M, N]; see `lora_spans`."""

    @staticmethod
    def forward(ctx, y, x, places, *tensors):
        dtype = torch.promote_types(x.dtype, torch.float32)
        ctx.dtype = dtype if pretend.kind_of(x.device) == "cpu" else x.dtype
        ctx.places, lows = places, []
        for i, (start, end, scaling) in enumerate(places):
            A, B = (t.to(ctx.dtype) for t in tensors[2 * i : 2 * i + 2])
            low = F.linear(x[start:end].to(ctx.dtype), A)
            _add_product(y[start:end], low, B.t(), scaling)
            lows.append(low)
        ctx.save_for_backward(x, *lows, *tensors)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, *rest = ctx.saved_tensors
        n = len(ctx.places)
        lows, tensors = rest[:n], rest[n:]
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        found = []
        for i, (start, end, scaling) in enumerate(ctx.places):
            A, B = tensors[2 * i : 2 * i + 2]
            rows = dy[start:end].to(ctx.dtype)
            dlow = (rows @ B.to(ctx.dtype)).mul_(scaling)
            if dx is not None:
                _add_product(dx[start:end], dlow, A.to(ctx.dtype), 1.0)
            found.append((dlow.t() @ x[start:end].to(ctx.dtype)).to(A.dtype))
            found.append((rows.t() @ lows[i]).mul_(scaling).to(B.dtype))
        return dy, dx, None, *found


def _add_product(out: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """Add scaling a b to `out`, which may be of another dtype than they are."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, alpha=scaling)
    else:
        out.add_(a @ b, alpha=scaling)
