"""Cross-entropy fused with the head: a chunk of rows at a time, gradients in the forward pass.

The walk over the chunks is the same for every backend; what a backend does to a chunk's logits are
two functions of its module, `logits` and `loss_and_gradient`.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..frozen_linear import Packed, dequantize_rows

CHUNK_LOGITS = 1 << 24  # logits held at a time: 64 MB in fp32
PANEL = 1 << 22  # values of a packed head that are dense at a time: 16 MB in fp32


class Form(NamedTuple):
    """What is done to the logits, and what is added to the loss."""

    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def panels(head: Packed, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """A packed head [V, H], some rows of the vocabulary at a time, dense."""
    V, H = head.shape
    step = max(1, PANEL // H)
    for start in range(0, V, step):
        rows = torch.arange(start, min(start + step, V), device=head.device)
        yield slice(start, start + step), dequantize_rows(head, rows, dtype)


def _grad_hidden(grad: Tensor, head: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """[n, V] @ [V, H] -> [n, H]"""
    if isinstance(head, Tensor):
        return grad.to(head.dtype) @ head
    total = grad.new_zeros(len(grad), head.shape[1], dtype=torch.float32)
    for words, panel in panels(head, dtype):
        total += grad[:, words].to(dtype) @ panel
    return total


class LinearCrossEntropy(torch.autograd.Function):
    """hidden [N, H], weight [V, H] dense or packed, labels [N] (all valid) -> summed loss []."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, form: Form, backend: ModuleType):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        step = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, len(labels), step):
            h, y = hidden[start : start + step], labels[start : start + step]
            logits = backend.logits(h, weight)  # [n, H] @ [H, V] -> [n, V]
            loss, grad = backend.loss_and_gradient(logits, y, form, need_hidden or need_weight)
            total += loss
            if need_hidden:
                grad_hidden[start : start + step] = _grad_hidden(grad, weight, h.dtype)
            if need_weight:
                grad_weight += grad.t().float() @ h.float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
