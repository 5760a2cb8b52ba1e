"""Sums over the logits of the positions that have a label, which never exist all at once.

What is summed is a function of a chunk of logits. Its gradients are computed in the forward pass,
while the chunk is at hand, and backward only scales them: so a head costs one product forward and
one backward, and the memory of one chunk, whatever it computes. (`kernels.linear_cross_entropy`
does the same for one loss and a plain head, in fewer passes over the memory.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit import kernels
from lorakit.kernels import pretend
from lorakit.kernels.autograd import once_differentiable
from lorakit.kernels.ops.cross_entropy.linear import chunk_rows
from lorakit.models.decoder import Decoder
from lorakit.models.rows import next_tokens

PARTS = 8  # of a chunk of the fused loss on a GPU: a function in torch makes as many such tensors

OfChunk = Callable[[Tensor, Tensor, slice], Tensor]
"""f(logits [n, V], labels int64 [n], which of all positions they are) -> sums, fp32 [m]."""


class LabelStates(NamedTuple):
    """The last hidden states of the positions that predict a label."""

    hidden: Tensor
    """[N, H]."""
    labels: Tensor
    """The labels, int64 [N], where `hidden` lies."""


def label_states(
    model: Decoder,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> LabelStates:
    """Return the hidden states of the positions that predict a label, row after row.

    The arguments are those of `Decoder.loss`.
    """
    hidden = model.hidden_for_loss(input_ids, labels, attention_mask, cu_seqlens)
    return LabelStates(*kernels.labelled(hidden, next_tokens(labels, cu_seqlens)))


def summed_over_logits(model: Decoder, states: LabelStates, of_chunk: OfChunk) -> Tensor:
    """Return the sums of what a function makes of the logits, chunk by chunk.

    Args:
        model: The model, whose head computes the logits.
        states: The hidden states.
        of_chunk: The function. The first of its sums is the loss.

    Returns:
        The sums, fp32 [m]. Only the first is differentiable, in the hidden states and in what
        trains of the head.
    """
    hidden, labels = states
    size = chunk_rows(len(labels), model.config.vocab_size, hidden)
    if pretend.kind_of(hidden.device) != "cpu":
        size = max(1, size // PARTS)
    with model.whole_head() as head:
        learns = torch.is_grad_enabled()
        params = [p for p in head.layer.parameters() if learns and p.requires_grad]

        def chunk(hidden: Tensor, part: slice) -> Tensor:
            return of_chunk(head.logits(hidden), labels[part], part)

        sums: Tensor = _Sums.apply(chunk, size, hidden if learns else hidden.detach(), *params)
    return sums


class _Sums(torch.autograd.Function):
    """Map hidden [N, H], and what trains of the head, to the sums of a function of chunks, [m]."""

    @staticmethod
    def forward(
        ctx: Any, of_chunk: Callable[..., Tensor], size: int, hidden: Tensor, *params: Tensor
    ) -> Tensor:
        needs_hidden = ctx.needs_input_grad[2]
        found = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        of_hidden = torch.zeros_like(hidden) if needs_hidden else None
        parts = []
        for start in range(0, max(1, len(hidden)), size):
            part = slice(start, start + size)
            h = hidden[part].detach().requires_grad_(needs_hidden)
            inputs = [h, *params] if needs_hidden else list(params)
            with torch.set_grad_enabled(bool(inputs)):
                sums = of_chunk(h, part)
                loss = sums[0]
            parts.append(sums.detach())
            if not inputs:
                continue
            grads = list(torch.autograd.grad(loss, inputs, allow_unused=True))
            if of_hidden is not None:
                of_hidden[part] = grads.pop(0)
            for total, grad in zip(found, grads, strict=True):
                if grad is not None:
                    total += grad
        ctx.save_for_backward(of_hidden, *found)
        ctx.dtypes = [hidden.dtype, *(p.dtype for p in params)]
        return torch.stack(parts).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if found is None else (found.float() * grad[0]).to(dtype)
            for found, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, *scaled
