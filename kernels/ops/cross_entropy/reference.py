"""Cross-entropy in plain torch: of logits, and of a chunk of a linear head's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..float8 import Float8Weight, ScaledRows, product, scaled_rows
from ..frozen_linear.dense import panels
from .linear import Form, Head, is_ready


def cross_entropy(
    logits: Tensor, labels: Tensor, form: Form, ignore_index: int, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of logits [..., V], and the number of labels [...] that count."""
    flat, labels = logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1)
    if form.softcap is not None:
        flat = form.softcap * torch.tanh(flat / form.softcap)
    counted = labels != ignore_index
    losses = F.cross_entropy(
        flat,
        labels,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=form.label_smoothing,
    )
    if statistics is not None:
        _add_statistics(flat, labels, ignore_index, statistics)
    if form.z_loss:
        losses = losses + form.z_loss * flat.logsumexp(-1).square().masked_fill(~counted, 0)
    if form.dft:
        words = labels.masked_fill(~counted, 0)[:, None]
        losses = losses * flat.detach().log_softmax(-1).gather(-1, words)[:, 0].exp()
    return losses.sum(), counted.sum()


@torch.no_grad()
def _add_statistics(z: Tensor, labels: Tensor, ignored: int, statistics: Tensor) -> None:
    """Add what `cross_entropy` tells of logits fp32 [N, V], the soft cap applied."""
    counted = labels != ignored
    right = (z.argmax(-1) == labels) & counted  # argmax is the first of equals
    log_p = z.log_softmax(-1)
    entropies = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)
    statistics += torch.stack([right, entropies.masked_fill(~counted, 0)]).sum(1)


def token_cross_entropy(logits: Tensor, labels: Tensor, form: Form) -> Tensor:
    """Return the losses [N] of logits [N, V] and labels int64 [N]."""
    flat = logits.float()
    if form.softcap is not None:
        flat = form.softcap * torch.tanh(flat / form.softcap)
    return F.cross_entropy(flat, labels, reduction="none")


def logits(h: Tensor, head: Head) -> Tensor:
    """Return h [n, H] times the transpose of the head [V, H]: fp32 [n, V]."""
    if isinstance(head, Float8Weight):
        return product(scaled_rows([h], [None]), head).float()
    if is_ready(head, h.dtype):
        return F.linear(h, head).float()
    out = h.new_empty(len(h), head.shape[0], dtype=torch.float32)
    for words, panel in panels(head, h.dtype):
        out[:, words] = F.linear(h, panel)
    return out


def loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    form: Form,
    need: bool,
    ignored: int,
    statistics: Tensor | None = None,
) -> Tensor:
    """Return the summed loss [] of logits fp32 [n, V], which are given up, and labels int64 [n].

    If their gradients are needed, these are written over the logits. A label `ignored` counts for
    nothing. `statistics` are as in `cross_entropy`.
    """
    (cap, smoothing, z_loss, dft), slope = form, None
    out = labels[:, None] == ignored
    y = labels[:, None].masked_fill(out, 0)
    if cap is not None:
        logits = logits.div_(cap).tanh_().mul_(cap)
        slope = 1 - (logits / cap).square_() if need else None
    if statistics is not None:
        _add_statistics(logits, labels, ignored, statistics)
    lse, chosen = logits.logsumexp(-1, keepdim=True), logits.gather(-1, y)
    weight = (chosen - lse).exp_() if dft else None
    losses = lse - (1 - smoothing) * chosen
    if smoothing:
        losses -= smoothing * logits.mean(-1, keepdim=True)
    if z_loss:
        losses += z_loss * lse.square()
    if weight is not None:
        losses *= weight
    loss = losses.masked_fill_(out, 0).sum()
    if not need:
        return loss
    grad = logits.sub_(lse).exp_()  # softmax
    if z_loss:
        grad *= 1 + 2 * z_loss * lse
    grad.scatter_add_(-1, y, grad.new_full((), smoothing - 1).expand_as(y))
    if smoothing:
        grad -= smoothing / logits.shape[-1]
    if slope is not None:
        grad *= slope
    if weight is not None:
        grad *= weight
    grad.masked_fill_(out, 0)
    return loss


def loss_and_rounded_gradient(
    logits: Tensor, labels: Tensor, ignored: int, statistics: Tensor | None = None
) -> tuple[Tensor, ScaledRows]:
    """Return what `loss_and_gradient` does, for logits that are given up, and gradients in e4m3."""
    loss = loss_and_gradient(logits, labels, Form(), True, ignored, statistics)
    return loss, scaled_rows([logits], [None])
