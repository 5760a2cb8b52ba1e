"""Calls of the C++ kernels in cpu.cpp, in host memory.

They take fp32 and bf16, and fp16 by way of fp32 copies. q, k, v and the gradient are read where
they lie, whatever their strides, if the values of a head are side by side.
"""

import ctypes
import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ... import dispatch, threads
from ...autograd import once_differentiable
from ...dispatch import CPU_DTYPES, INT64, POINTER, address, run
from ..attention.cpu import HeadsView, dense_rows, view_of


class DeltaNet(ctypes.Structure):
    """`DeltaNet` of cpu.cpp: the arguments of both directions."""

    _fields_ = (
        *((name, HeadsView) for name in ("q", "k", "v", "dy", "y", "dq", "dk", "dv")),
        *((name, POINTER) for name in ("g", "beta", "dg", "dbeta")),
        *((name, POINTER) for name in ("before", "after", "kept", "documents", "space")),
        *((name, INT64) for name in ("count", "slots", "size", "T", "nk", "nv", "dk_", "dv_")),
    )


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the kernels take the operands."""
    return q.dtype in dispatch.FLOATS and q.dtype == k.dtype == v.dtype and v.numel() > 0


@functools.lru_cache(maxsize=64)
def _sizes(isa: str, dk: int, dv: int, group: int) -> tuple[int, ...]:
    """Return the tokens of a span, and the floats of a thread's space forward and backward."""
    sizes = (INT64 * 3)()
    entry = dispatch.sizes_function("delta_net_sizes", INT64, INT64, INT64, POINTER)
    entry(dk, dv, group, ctypes.addressof(sizes))
    return tuple(sizes)


@functools.lru_cache(maxsize=16)  # all layers of a model, in both directions, ask for one
def _documents(B: int, lengths: tuple[int, ...], span: int) -> tuple[Tensor, int]:
    """Return `Document[]` of cpu.cpp, the longest first, and how many states are kept of them."""
    starts = list(accumulate(lengths, initial=0))[:-1]
    spans = [max(0, length - 1) // span for _ in range(B) for length in lengths]
    firsts = list(accumulate(spans, initial=0))
    documents = [
        (b, start, length, firsts[b * len(lengths) + i])
        for b in range(B)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
        if length
    ]
    documents.sort(key=lambda document: -document[2])
    return torch.tensor(documents, dtype=torch.int64, device="cpu"), firsts[-1]


def _launch(
    op: str,
    heads: dict[str, Tensor],
    pointers: dict[str, Tensor | None],
    documents: Tensor,
) -> None:
    """Call the C function of `op` with views of tensors [B, T, heads, D] and with addresses."""
    (T, nk, dk), (nv, dv) = heads["q"].shape[1:], heads["v"].shape[2:]
    _, forward, backward = _sizes(dispatch.isa(), dk, dv, nv // nk)
    size = backward if "dq" in heads else forward
    slots = min(threads.count(), len(documents) * nk)
    # places behind the end of a document are multiplied by 0, so that they have to be finite
    space = torch.zeros((slots, size), dtype=torch.float32, device=documents.device)
    pointers = {**pointers, "documents": documents, "space": space}
    numbers = {"count": len(documents), "slots": slots, "size": size, "T": T, "nk": nk, "nv": nv}
    arguments = DeltaNet(
        **{name: view_of(x) for name, x in heads.items()},
        **{name: address(x) for name, x in pointers.items()},
        **numbers,
        dk_=dk,
        dv_=dv,
    )
    run(op, heads["q"].dtype, arguments)


class GatedDeltaNet(torch.autograd.Function):
    """Map q, k, v [B, T, heads, D], g and beta fp32 [B, T, nv] to o [B, T, nv, dv] and a state."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, lengths, with_state):
        q, k, v = (dense_rows(x) for x in (q, k, v))
        (B, _, nv, dv), dk, on = v.shape, q.shape[3], q.device
        span = _sizes(dispatch.isa(), dk, dv, nv // q.shape[2])[0]
        documents, states = _documents(B, lengths, span)
        y = torch.empty(v.shape, dtype=v.dtype, device=on)
        fp32 = functools.partial(torch.empty, dtype=torch.float32, device=on)
        kept = fp32((states, nv, dk, dv)) if any(ctx.needs_input_grad) else None
        after = fp32((B, nv, dk, dv)) if with_state else None
        pointers = {"g": g, "beta": beta, "before": state, "after": after, "kept": kept}
        _launch("delta_net", {"q": q, "k": k, "v": v, "y": y}, pointers, documents)
        ctx.save_for_backward(q, k, v, g, beta, state, kept)
        ctx.documents = documents
        if after is not None:
            ctx.mark_non_differentiable(after)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        q, k, v, g, beta, state, kept = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta)]
        dq, dk, dv, dg, dbeta = grads
        heads = {"q": q, "k": k, "v": v, "dy": dense_rows(dy), "dq": dq, "dk": dk, "dv": dv}
        pointers = {"g": g, "beta": beta, "dg": dg, "dbeta": dbeta, "before": state, "kept": kept}
        _launch("delta_net_backward", heads, pointers, ctx.documents)
        return dq, dk, dv, dg, dbeta, None, None, None


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
    """Run the rule by the kernels, for operands that fit: o in v's dtype, and the state."""
    dtype = v.dtype
    if dtype not in CPU_DTYPES:
        q, k, v = q.float(), k.float(), v.float()
    gates = (x.float().contiguous() for x in (g, beta))
    state = None if state is None else state.detach().float().contiguous()
    lengths = (q.shape[1],) if lengths is None else tuple(lengths)
    o, last = GatedDeltaNet.apply(q, k, v, *gates, state, lengths, with_state)
    return o.to(dtype), last
