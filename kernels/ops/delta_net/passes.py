"""The gated delta rule on a GPU, forward and backward, by `triton`'s kernels.

Nothing but the inputs is kept for backward. It scans once more and writes S and dS of every chunk,
for as many heads at a time as MOST_STATES values take. q and k are normalized by the kernels of
rms_norm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...autograd import once_differentiable
from ..attention.documents import Documents, equal_documents
from ..attention.triton import flat
from ..rms_norm import triton as rms_norm
from .reference import EPS
from .triton import Heads

MOST_STATES = 1 << 26  # values of states that backward may hold at a time


class _Unit:
    """The rows of q or k [N, heads, D] with length `scale`, in fp32, by the kernels of rms_norm.

    The mean of D squares is their sum divided by D, so that eps is divided too.
    """

    def __init__(self, x: Tensor, scale: float):
        self.x, D = x.float().reshape(-1, x.shape[2]), x.shape[2]
        self.weight = torch.full((D,), scale * D**-0.5, dtype=torch.float32, device=x.device)
        y, _, self.rstd = rms_norm.normalize(self.x, None, self.weight, EPS / D, 0.0, False)
        self.value, self.dtype = y.view(x.shape), x.dtype

    def gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of x from that of the value."""
        rows = grad.view(self.x.shape)
        dx, _ = rms_norm.gradients(rows, None, self.x, self.weight, self.rstd, 0.0, False)
        return dx.view(grad.shape).to(self.dtype)


class GatedDeltaNet(torch.autograd.Function):
    """Map q, k [N, nk, dk], v [N, nv, dv], g and beta fp32 [N, nv] to o [N, nv, dv] and states."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, documents, with_state):
        unit = _Unit(q, q.shape[2] ** -0.5).value, _Unit(k, 1.0).value
        rows = Heads(documents.tiles(len(v), v.device), *unit, v, g, beta)
        chunks = rows.chunks()
        y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        after = None
        if with_state:
            after = rows.fp32(len(documents), v.shape[1], q.shape[2], v.shape[2])
            ctx.mark_non_differentiable(after)
        rows.scan(rows.local(chunks), y, state, after, None, None)
        ctx.save_for_backward(q, k, v, g, beta, state, rows.table, chunks)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        q, k, v, g, beta, state, table, chunks = ctx.saved_tensors
        dy = dy if dy.stride(2) == 1 else dy.contiguous()
        units = _Unit(q, q.shape[2] ** -0.5), _Unit(k, 1.0)
        inputs = *(unit.value for unit in units), v, g, beta
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
        nk, group = q.shape[1], v.shape[1] // q.shape[1]
        each = 2 * len(chunks) * group * q.shape[2] * v.shape[2]  # values of states
        step = max(1, MOST_STATES // each)  # key heads
        for first in range(0, nk, step):
            keys = slice(first, first + step)
            values = slice(first * group, (first + step) * group)
            parts = (keys, keys, values, values, values)
            given = [x[:, part] for x, part in zip(inputs, parts, strict=True)]
            found = [x[:, part] for x, part in zip(grads, parts, strict=True)]
            before = None if state is None else state[:, values].contiguous()
            Heads(table, *given).differentiate(chunks, before, dy[:, values], found)
        dq, dk = (unit.gradient(grad) for unit, grad in zip(units, grads[:2], strict=True))
        return dq, dk, *grads[2:], None, None, None


def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    lengths: Sequence[int] | None,
    with_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run the rule within the documents of a row, or within each row, for operands that fit."""
    if lengths is None:
        lengths = equal_documents(*q.shape[:2])
    documents = lengths if isinstance(lengths, Documents) else Documents(lengths)
    rows = [flat(x) for x in (q, k, v)]
    gates = [x.float().reshape(-1, x.shape[2]).contiguous() for x in (g, beta)]
    state = None if state is None else state.detach().float().contiguous()
    o, last = GatedDeltaNet.apply(*rows, *gates, state, documents, with_state)
    return o.view(v.shape), last
