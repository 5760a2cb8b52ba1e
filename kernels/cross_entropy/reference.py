"""Cross-entropy in plain torch; the fused form is an autograd function over chunks of rows."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..frozen_linear import Packed, dequantize_rows

CHUNK_LOGITS = 1 << 24  # logits held at a time: 64 MB in fp32
PANEL = 1 << 22  # values of a packed head that are dense at a time: 16 MB in fp32


def cross_entropy(
    logits: Tensor, labels: Tensor, softcap: float | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    flat = logits.reshape(-1, logits.shape[-1]).float()
    if softcap is not None:
        flat = softcap * torch.tanh(flat / softcap)
    total = F.cross_entropy(flat, labels.reshape(-1), ignore_index=ignore_index, reduction="sum")
    return total, (labels != ignore_index).sum()


def _panels(head: Packed, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """A packed head [V, H], some rows of the vocabulary at a time, dense."""
    V, H = head.shape
    step = max(1, PANEL // H)
    for start in range(0, V, step):
        rows = torch.arange(start, min(start + step, V), device=head.device)
        yield slice(start, start + step), dequantize_rows(head, rows, dtype)


def _logits(h: Tensor, head: Tensor | Packed) -> Tensor:
    """[n, H] @ [H, V] -> fp32 [n, V]"""
    if isinstance(head, Tensor):
        return F.linear(h, head).float()
    logits = h.new_empty(len(h), head.shape[0], dtype=torch.float32)
    for words, panel in _panels(head, h.dtype):
        logits[:, words] = F.linear(h, panel)
    return logits


def _grad_hidden(grad: Tensor, head: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """[n, V] @ [V, H] -> [n, H]"""
    if isinstance(head, Tensor):
        return grad.to(head.dtype) @ head
    total = grad.new_zeros(len(grad), head.shape[1])
    for words, panel in _panels(head, dtype):
        total += grad[:, words].to(dtype) @ panel
    return total


class LinearCrossEntropy(torch.autograd.Function):
    """hidden [N, H], weight [V, H] dense or packed, labels [N] (all valid) -> summed loss []."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, softcap):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        step = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, len(labels), step):
            h, y = hidden[start : start + step], labels[start : start + step, None]
            logits = _logits(h, weight)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
                slope = 1 - (logits / softcap).square_() if need_hidden or need_weight else None
            lse = logits.logsumexp(-1, keepdim=True)
            total += (lse - logits.gather(-1, y)).sum()
            if need_hidden or need_weight:
                grad = logits.sub_(lse).exp_()  # softmax, over the logits' memory
                grad.scatter_add_(-1, y, grad.new_full((), -1).expand_as(y))
                if softcap is not None:
                    grad *= slope
                if need_hidden:
                    grad_hidden[start : start + step] = _grad_hidden(grad, weight, h.dtype)
                if need_weight:
                    grad_weight += grad.t() @ h.float()
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
        return grad_hidden, grad_weight, None, None
