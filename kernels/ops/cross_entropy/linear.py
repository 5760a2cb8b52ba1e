"""Cross-entropy fused with the head: a chunk of rows at a time, gradients in the forward pass.

All backends share the walk over the chunks. What a backend does to a chunk's logits are two
functions of its module, `logits` and `loss_and_gradient`.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch, pretend
from ...autograd import once_differentiable
from .. import products
from ..float8 import Float8Weight, product_back, rounded_product_back
from ..frozen_linear.dense import Packed, panels
from ..products import Sum, Term

# Logits held at a time: 24 MB on a CPU, but not fewer than FEWEST rows, because every chunk lays
# the head out again. On a GPU, which products of few rows leave half idle, they are 256 MB in bf16,
# and a multiple of TILE rows.
CHUNK_BYTES, FEWEST = 24 << 20, 128
CHUNK_LOGITS_GPU, TILE = 1 << 27, 128
DEPTH = 4096  # words whose part of the hidden states' gradient is added up at a time


class Form(NamedTuple):
    """What is done to the logits and added to the loss; `__init__.py` has the formulas."""

    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False


def chunk_rows(rows: int, vocabulary: int, hidden: Tensor) -> int:
    """Return the rows of a chunk, where there are `rows` in all."""
    if pretend.kind_of(hidden.device) == "cpu":
        most = max(FEWEST, CHUNK_BYTES // (vocabulary * hidden.element_size()))
        chunks = max(1, -(-rows // most))
        return max(1, dispatch.rounded_up(-(-rows // chunks), hidden.device))
    rows = max(1, CHUNK_LOGITS_GPU // vocabulary)
    return rows - rows % TILE if rows > TILE else rows


Head = Tensor | Packed | Float8Weight


def is_ready(head: Head, dtype: torch.dtype) -> TypeGuard[Tensor]:
    """Return whether products in `dtype` can take the head as it is."""
    return isinstance(head, Tensor) and head.dtype == dtype


def by_sums(head: Head, h: Tensor) -> TypeGuard[Tensor]:
    """Return whether the products of h with the head, a dense one, are those of `products`."""
    return isinstance(head, Tensor) and products.available(h) and products.takes(head)


def _grad_hidden(grad: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Return grad [n, V] @ head [V, H]: [n, H]."""
    if isinstance(head, Float8Weight):
        return product_back([grad], [head])
    if by_sums(head, grad):
        part = grad.new_empty(len(grad), head.shape[1], dtype=torch.float32)
        total = torch.zeros_like(part)
        for start in range(0, len(head), DEPTH):
            words = slice(start, start + DEPTH)
            products.sums_of_products([Sum([Term(grad[:, words], head[words], False)], part)])
            total += part
        return total
    if is_ready(head, dtype):
        return dispatch.linear(grad.to(dtype), head.t())
    total = grad.new_zeros(len(grad), head.shape[1], dtype=torch.float32)
    for words, panel in panels(head, dtype):
        total += dispatch.linear(grad[:, words].to(dtype), panel.t())
    return total


def _grad_weight(grad: Tensor, h: Tensor) -> Tensor:
    """Return grad [n, V]^T @ h [n, H]: [V, H].

    On a GPU the product is in the dtype of h, whose units are ten times as fast as those of fp32,
    and each chunk's is rounded to it; on a CPU it is in fp32.
    """
    if pretend.kind_of(h.device) == "cpu":
        return grad.t().float() @ h.float()
    return grad.t().to(h.dtype) @ h


def _float8_loss(
    hidden: Tensor,
    head: Float8Weight,
    labels: Tensor,
    backend: ModuleType,
    ignored: int,
    statistics: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss [] and the gradient of hidden [N, H], both products in float8.

    The gradients of the logits are made e4m3 where they are made.
    """
    grad_hidden = torch.empty_like(hidden)
    total = hidden.new_zeros((), dtype=torch.float32)
    step = chunk_rows(len(labels), head.shape[0], hidden)
    for start in range(0, len(labels), step):
        part = slice(start, start + step)
        logits = backend.logits(hidden[part], head)
        options = labels[part], ignored, statistics
        loss, grad = backend.loss_and_rounded_gradient(logits, *options)
        del logits
        grad_hidden[part] = rounded_product_back(grad, head)
        total = total + loss
    return total, grad_hidden


def _losses(
    backend: ModuleType,
    logits: Tensor,
    labels: Tensor,
    parts: Sequence[int] | None,
    start: int,
    options: tuple[Any, ...],
) -> Tensor:
    """Return the summed loss [] of a chunk of rows from `start` on, or of each part of all rows.

    A part may have no row in the chunk.
    """
    if parts is None:
        return backend.loss_and_gradient(logits, labels, *options)
    sums = logits.new_zeros(len(parts), dtype=torch.float32)
    bounds = [min(max(0, end - start), len(labels)) for end in accumulate(parts, initial=0)]
    for i, (first, end) in enumerate(pairwise(bounds)):
        if first < end:
            rows = slice(first, end)
            sums[i] = backend.loss_and_gradient(logits[rows], labels[rows], *options)
    return sums


class LinearCrossEntropy(torch.autograd.Function):
    """Map hidden [N, H], a head [V, H] and labels [N] to the summed loss [].

    A label is a word, or `ignored`.

    The head is `weight`, dense, packed or in float8; with lora_A [r, H] and lora_B [V, r] it is
    weight + scaling B A. With the counts of `parts` that the N rows consist of, the sums of these
    [parts] are returned; the head is frozen then, and has no update.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, lora_A, lora_B, scaling, labels, form: Form, backend: ModuleType,
        ignored: int, statistics: Tensor | None = None, parts: Sequence[int] | None = None,
    ):  # fmt: skip
        ctx.parts = parts
        if isinstance(weight, Float8Weight) and weight.centred and (form.softcap or form.z_loss):
            raise ValueError("a soft cap and a z-loss see the mean row that the head is without")
        plain = lora_A is None and form == Form() and parts is None
        if isinstance(weight, Float8Weight) and plain and ctx.needs_input_grad[0]:
            ctx.dtypes = [hidden.dtype, None, None, None]
            loss, of_hidden = _float8_loss(hidden, weight, labels, backend, ignored, statistics)
            ctx.save_for_backward(of_hidden, None, None, None)
            return loss
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, lora_A, lora_B)]
        need_hidden, _, need_A, _ = need = ctx.needs_input_grad[:4]
        hidden = hidden.to(dispatch.product_dtype(hidden))
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight, grad_A, grad_B = (
            torch.zeros_like(t, dtype=torch.float32) if needed else None
            for t, needed in zip((weight, lora_A, lora_B), need[1:], strict=True)
        )
        if adapted := lora_A is not None:
            A, sB = lora_A.to(hidden.dtype), (lora_B * scaling).to(hidden.dtype)
        total: Tensor | None = None
        step = chunk_rows(len(labels), weight.shape[0], hidden)
        for start in range(0, len(labels), step):
            h, y = hidden[start : start + step], labels[start : start + step]
            n, filling = len(h), dispatch.rounded_up(len(h), h.device) - len(h)
            if filling:
                h = F.pad(h, (0, 0, 0, filling))
            logits = backend.logits(h, weight)  # [n, H] @ [H, V] -> [n, V]
            if adapted:
                low = h @ A.t()  # [n, H] @ [H, r]
                logits.addmm_(low.to(logits.dtype), sB.t().to(logits.dtype))
            options = form, any(need), ignored, statistics
            part = _losses(backend, logits[:n], y, parts, start, options)
            total = part if total is None else total + part
            grad = logits  # which they have become; the filling has none
            if filling:
                grad[n:] = 0
            if grad_hidden is not None:
                grad_hidden[start : start + step] = _grad_hidden(grad, weight, h.dtype)[:n]
            if grad_weight is not None:
                grad_weight += _grad_weight(grad, h)
            if grad_B is not None:
                grad_B += scaling * (grad.t() @ low.to(grad.dtype)).float()
            if adapted and (need_hidden or need_A):
                dlow = grad.to(h.dtype) @ sB  # [n, V] @ [V, r]
            if adapted and grad_hidden is not None:
                grad_hidden[start : start + step].addmm_(dlow[:n].to(A.dtype), A)
            if grad_A is not None:
                grad_A += (dlow.t() @ h).float()
            del logits, grad  # before the next chunk's are made
        ctx.save_for_backward(grad_hidden, grad_weight, grad_A, grad_B)
        if total is None:
            total = hidden.new_zeros(() if parts is None else len(parts), dtype=torch.float32)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.parts is not None:  # that of each row, then
            counts = torch.tensor(ctx.parts, device=grad.device)
            grad = grad.repeat_interleave(counts, output_size=sum(ctx.parts))[:, None]
        scaled = (
            None if g is None else (g.float() * grad).to(dtype)  # grad is one over the labels: fp32
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, *(None,) * 7
