"""The passes of layers with low-rank updates, and of a gated MLP of them, for autograd.

`LoraMLP` keeps gate and up, or computes them again in backward. Under gradient checkpointing a
block runs twice before its backward, and what its MLP computes in the second run would be computed
a third time in backward. So there the MLP is two steps of autograd: `TiledMLPInput` keeps what
backward needs, before anything is computed, and `TiledMLPOutput` computes y. The second run of a
block is cut short at the last tensor that is kept, which comes before all products of the MLP.

Rows beyond TILE go through that MLP a tile at a time, forward and backward, so that gate, up and
their gradients take the memory of one tile (TiledMLP, arXiv:2506.13996, section 3.1). The gradients
of A and B are sums over the tiles, in their order.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import dispatch, pretend
from ...autograd import once_differentiable, without_autocast
from .. import swiglu
from ..products import Sum, sums_of_products
from ..swiglu.updates import Update, Updates, adds_updates
from . import cpu, float8, reference
from .tensors import TENSORS, Dropout, Static

TILE = 8192
"""Rows of an MLP that are computed at once under gradient checkpointing."""

Again = tuple[Callable[[Tensor], Tensor], Tensor] | None
Parts = tuple[tuple[Static, Dropout], tuple[Static, Dropout]]
"""What autograd does not see of gate and up, and of down."""


def group_of(
    x: Tensor,
    static: Static,
    drop: Dropout,
    tensors: Sequence[Any],
    room: int = 0,
    by_sums: bool = True,
) -> cpu.Group | reference.Group:
    """Return the layers for one pass on x [M, K] with room, or on gradients in its dtype."""
    found = cpu.group(x, static, drop, tensors) if by_sums else None
    if found is not None:
        return found
    dtype = dispatch.product_dtype(x)
    kind = float8.Float8Group if float8.takes(static, dtype) else reference.Group
    return kind(static, drop, tensors, dtype, room)


def _keep(ctx, x: Tensor, again: Again, *tensors: Tensor | None) -> None:
    """Keep tensors for backward, and x [M, K] itself, or what it is made of."""
    ctx.make, source = (None, x) if again is None else again
    ctx.save_for_backward(source, *tensors)


def _keep_groups(ctx, x: Tensor, *groups: cpu.Group | reference.Group) -> None:
    """Keep the layers for backward, without dense weights. The first ones read x.

    Under autocast the gradients may have another dtype than x: then they are made again.
    """
    ctx.groups = None
    if not pretend.autocasts(x.device):
        ctx.groups = groups
        for i, group in enumerate(groups):
            group.rest(x_stays=i == 0 and ctx.make is None)


def _kept(ctx) -> tuple[Any, ...]:
    """Return x and the tensors that `_keep` has kept; they are Tensor | None."""
    source, *tensors = ctx.saved_tensors
    if ctx.make is not None:
        with torch.no_grad():
            made = ctx.make(source)
        source = made.reshape(-1, made.shape[-1])
    return source, *tensors


def _needs(ctx, before: int) -> tuple[bool, Sequence[bool], Sequence[bool]]:
    """Return which gradients an MLP is asked for: of x, of gate's and up's tensors, of down's.

    `before` is the number of arguments before the tensors.
    """
    (inner, _), _ = ctx.static
    split = before + TENSORS * len(inner)
    needed = ctx.needs_input_grad
    return needed[0], needed[before:split], needed[split:]


def _cast(dx: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if dx is None else dx.to(dtype)


class LoraLinears(torch.autograd.Function):
    """Map x [M, K] to y [M, N] of each layer."""

    @staticmethod
    def forward(ctx, x, again, room, static, drop, *tensors):
        _keep(ctx, x, again, *tensors)
        ctx.static, ctx.drop = static, drop
        group = group_of(x, static, drop, tensors, room)
        same = group.dtype == x.dtype
        ys = group.forward(x.to(group.dtype), by_base=same)
        _keep_groups(ctx, x, group)
        return tuple(ys if same else (y.to(x.dtype) for y in ys))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, *grads):
        x, *tensors = _kept(ctx)
        (group,) = ctx.groups or [group_of(grads[0], ctx.static, ctx.drop, tensors)]
        small: list[Sum] = []
        later: list[Sum] = []
        x_like = x.to(group.dtype)
        group.take([dy.to(group.dtype) for dy in grads], small, x=x_like)
        dx = group.grad_x(later) if ctx.needs_input_grad[0] else None
        found = group.grad_tensors(x_like, ctx.needs_input_grad[5:], later)
        sums_of_products(small, later)
        group.end()
        return _cast(dx, x.dtype), None, None, None, None, *found


def mlp_groups(
    x: Tensor,
    static: Parts,
    tensors: Sequence[Any],
    rooms: tuple[int, int] = (0, 0),
) -> tuple[Any, Any]:
    """Return the groups of gate and up, and of down, for one pass: both compute in one dtype."""
    inner, outer = static
    split = TENSORS * len(inner[0])

    def made(by_sums: bool) -> tuple[Any, Any]:
        first = group_of(x, *inner, tensors[:split], rooms[0], by_sums)
        return first, group_of(x, *outer, tensors[split:], rooms[1], by_sums)

    first, second = made(by_sums=True)
    if first.dtype == second.dtype:
        return first, second
    return made(by_sums=False)  # torch multiplies one of them, as it has DoRA, and does so in fp32


class LoraMLP(torch.autograd.Function):
    """Map x [M, K] to y [M, N], through gate, up and down."""

    @staticmethod
    def forward(
        ctx, x, hidden_act, keep, again, rooms, inner, inner_drop, outer, outer_drop, *tensors
    ):
        ctx.hidden_act, ctx.rooms = hidden_act, rooms
        ctx.static = (inner, inner_drop), (outer, outer_drop)
        groups = mlp_groups(x, ctx.static, tensors, rooms)
        y, gate, up = _mlp(x, groups, hidden_act, rooms)
        _keep(ctx, x, again, *((gate, up) if keep else (None, None)), *tensors)
        _keep_groups(ctx, x, *groups)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        x, gate, up, *tensors = _kept(ctx)
        groups = ctx.groups or mlp_groups(grad, ctx.static, tensors, ctx.rooms)
        needs = _needs(ctx, 9)
        kept = None if gate is None else (gate, up)
        dx, found = _mlp_backward(x, kept, grad, groups, ctx.hidden_act, ctx.rooms, needs)
        return dx, *(None,) * 8, *found


class TiledMLPInput(torch.autograd.Function):
    """Map x [M, K] to itself, and keep what backward needs. Its gradient comes as that of y.

    `TiledMLPOutput` hands the gradient of y on; K = N.
    """

    @staticmethod
    def forward(ctx, x, hidden_act, again, rooms, static, *tensors):
        ctx.hidden_act, ctx.rooms, ctx.static = hidden_act, rooms, static
        _keep(ctx, x, again, *tensors)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        x, *tensors = _kept(ctx)
        needs = _needs(ctx, 5)
        dx: Tensor | None = None
        sums: list[Tensor | None] = [None] * len(tensors)
        for rows, static in _tiles(len(x), ctx.static):
            groups = mlp_groups(grad[rows], static, tensors, ctx.rooms)
            if isinstance(groups[0], float8.Float8Group):
                groups[0].leave_updates()  # as forward did
            part, found = _mlp_backward(
                x[rows], None, grad[rows], groups, ctx.hidden_act, ctx.rooms, needs
            )
            dx = _with_rows(dx, rows, part, len(x))
            sums = [_added(total, each) for total, each in zip(sums, found, strict=True)]
        return dx, *(None,) * 4, *sums


class TiledMLPOutput(torch.autograd.Function):
    """Map what `TiledMLPInput` returned to y [M, N], and keep nothing."""

    @staticmethod
    def forward(ctx, x, hidden_act, rooms, static, tensors):
        y: Tensor | None = None
        for rows, layers in _tiles(len(x), static):
            groups = mlp_groups(x[rows], layers, tensors, rooms)
            y = _with_rows(y, rows, _mlp(x[rows], groups, hidden_act, rooms)[0], len(x))
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad, *(None,) * 4


def _tiles(rows: int, static: Parts) -> Iterator[tuple[slice, Parts]]:
    """Yield tiles of about the same number of rows, and the layers with masks of their own."""
    count = max(1, -(-rows // TILE))
    size = -(-rows // count)
    for i in range(count):
        inner, outer = ((layers, drop._replace(seed=drop.seed + i)) for layers, drop in static)
        yield slice(i * size, min((i + 1) * size, rows)), (inner, outer)


def _with_rows(whole: Tensor | None, rows: slice, part: Tensor | None, count: int) -> Tensor | None:
    """Return `count` rows with those of a tile in their place; a tile that is all of them is it."""
    if part is None or len(part) == count:
        return part
    if whole is None:
        whole = part.new_empty(count, part.shape[1])
    whole[rows] = part
    return whole


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total.add_(part)


def _mlp(
    x: Tensor, groups: tuple[Any, Any], hidden_act: str, rooms: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [M, N] in x's dtype, and gate and up [M, I]."""
    first, second = groups
    eights = isinstance(first, float8.Float8Group)
    if eights:
        first.leave_updates()
    same = first.dtype == x.dtype
    gate, up = first.forward(x.to(first.dtype), by_base=same)
    left = first.left(x) if eights else None
    if rooms[0] or left:
        hidden = swiglu.gated_beside(gate, up, hidden_act, rooms[1], left)
    else:
        hidden = swiglu.gated(gate, up, hidden_act)
    (y,) = second.forward(hidden, by_base=same)
    return (y if same else y.to(x.dtype)), gate, up


def _mlp_backward(
    x: Tensor,
    kept: tuple[Tensor, Tensor] | None,
    grad: Tensor,
    groups: tuple[Any, Any],
    hidden_act: str,
    rooms: tuple[int, int],
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of x [M, K] and of the tensors, for that of y, grad [M, N].

    `kept` are gate and up, if they were. `needs` says which gradients are wanted: that of x, those
    of gate's and up's tensors, those of down's.
    """
    first, second = groups
    flat = x.to(first.dtype)
    # before gate and up, whose dense weights stay from here to dx
    dtype = first.dtype if kept is None else kept[0].dtype
    hidden, updates = _through(first, second, flat, dtype, grad.to(second.dtype))
    second.forget_weights()
    wide = None  # [d gate | d up | room]
    if kept is None:
        gate, up = into = first.forward(flat, by_base=False)
        if rooms[0]:
            wide = reference.widened(gate, 2 * gate.shape[1] + rooms[0])
    elif rooms[0]:
        gate, up = kept
        M, inner = gate.shape
        wide = torch.empty((M, 2 * inner + rooms[0]), dtype=gate.dtype, device=gate.device)
        into = wide[:, :inner], wide[:, inner : 2 * inner]
    else:  # another backward may ask for them
        gate, up = kept
        into = torch.empty((2, *gate.shape), dtype=gate.dtype, device=gate.device).unbind()
    # the hidden state goes over its gradient
    swiglu.gated_backward_(hidden, gate, up, hidden_act, into, updates)
    small: list[Sum] = []
    later: list[Sum] = []
    first.take(into, small, wide, flat)
    dx = first.grad_x(later) if needs[0] else None
    of_inner = first.grad_tensors(flat, needs[1], later)
    of_outer = second.grad_tensors(hidden, needs[2], later)
    sums_of_products(small, later)
    first.end()
    second.end()
    return _cast(dx, x.dtype), [*of_inner, *of_outer]


def _through(first, second, x, dtype, grad) -> tuple[Tensor, Updates | None]:
    """Return the hidden state's gradient, and the updates that the activation is to add.

    `dtype` is that of gate and up.
    """
    small: list[Sum] = []
    later: list[Sum] = []
    second.take([grad], small)
    left = first.left(x) if isinstance(first, float8.Float8Group) else None
    apart = isinstance(second, reference.Group) and dtype == second.dtype
    apart = apart and not second.drop.rate and adds_updates(grad, second.ranks)
    if apart:
        of_grad = Update(second.dlow, second.A)
        return second.grad_x(later, apart=True), (of_grad, *(left or (None, None)))
    of_hidden = second.grad_x(later)
    sums_of_products(small, later)
    return of_hidden, None if left is None else (None, *left)
