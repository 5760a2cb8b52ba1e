"""Calls of the C++ kernel in cpu.cpp: fp32 and bf16, in host memory."""

import ctypes

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import CPU_DTYPES, FLOAT, INT64, POINTER, address, run
from ..frozen_linear.dense import Packed, panels
from ..products import Sum, Term, dense_rows, sums_of_products
from .linear import Form, by_sums, is_ready


class LogitRows(ctypes.Structure):
    """`LogitRows` of cpu.cpp: the arguments of `cross_entropy`, in both directions."""

    _fields_ = (
        *((name, POINTER) for name in ("logits", "labels", "loss", "lse", "right", "entropy")),
        *((name, POINTER) for name in ("gradient", "scale")),
        *((name, INT64) for name in ("stride", "gradient_stride", "N", "V", "ignored", "dft")),
        *((name, FLOAT) for name in ("cap", "smoothing", "z_loss")),
    )


def fits(x: Tensor) -> bool:
    """Return whether the kernel takes logits or hidden states like x."""
    return x.dtype in CPU_DTYPES


def _run(
    logits: Tensor, labels: Tensor, loss: Tensor | None, lse: Tensor, gradient: Tensor | None,
    scale: Tensor | None, form: Form, ignore_index: int, statistics: Tensor | None = None,
) -> None:  # fmt: skip
    told: Tensor | None = None
    right: Tensor | None = None
    entropy: Tensor | None = None
    if statistics is not None:
        told = lse.new_empty((2, len(lse)))
        right, entropy = told.unbind()
    tensors = logits, labels, loss, lse, right, entropy, gradient, scale
    pointers = [address(t) for t in tensors]
    strides = logits.stride(0), 0 if gradient is None else gradient.stride(0)
    options = form.dft, form.softcap or 0.0, form.label_smoothing, form.z_loss
    arguments = LogitRows(*pointers, *strides, *logits.shape, ignore_index, *options)
    run("cross_entropy", logits.dtype, arguments)
    if statistics is not None and told is not None:
        statistics += told.sum(1)


def _check(labels: Tensor, V: int, ignore_index: int) -> None:
    known = ((labels >= 0) & (labels < V)) | (labels == ignore_index)
    if not known.all():
        label = labels[~known][0].item()
        raise IndexError(f"label {label} is outside of the vocabulary of {V} words")


def loss_and_lse(
    logits: Tensor, labels: Tensor, form: Form, ignore_index: int, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the losses and log-sum-exps, fp32 [N], of logits [N, V] and labels int64 [N].

    The rows of the logits may lie apart. Raises IndexError for a label that is not a word.
    `statistics` are as in `cross_entropy`.
    """
    _check(labels, logits.shape[1], ignore_index)
    loss, lse = torch.empty((2, len(labels)), dtype=torch.float32, device=labels.device).unbind()
    _run(logits, labels, loss, lse, None, None, form, ignore_index, statistics)
    return loss, lse


def gradient(
    logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, form: Form, ignore_index: int,
) -> Tensor:  # fmt: skip
    """Return d (scale * sum of losses) / d logits, [N, V]; scale: fp32 []."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run(logits, labels, None, lse, out, scale, form, ignore_index)
    return out


def logits(h: Tensor, head: Tensor | Packed) -> Tensor:
    """Return h [n, H] times the transpose of the head [V, H]: [n, V] in h's dtype."""
    if by_sums(head, h):
        out = torch.empty((len(h), head.shape[0]), dtype=h.dtype, device=h.device)
        sums_of_products([Sum([Term(dense_rows(h), head, True)], out)])
        return out
    if is_ready(head, h.dtype):
        return dispatch.linear(h, head)
    out = torch.empty((len(h), head.shape[0]), dtype=h.dtype, device=h.device)
    for words, panel in panels(head, h.dtype):
        torch.mm(h, panel.t(), out=out[:, words])
    return out


def loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    form: Form,
    need: bool,
    ignored: int,
    statistics: Tensor | None = None,
) -> Tensor:
    """Return the summed loss [] of logits [n, V] and labels int64 [n].

    If their gradients are needed, these are written over the logits. A label `ignored` counts for
    nothing. `statistics` are as in `cross_entropy`.
    """
    _check(labels, logits.shape[1], ignored)
    loss, lse = torch.empty((2, len(labels)), dtype=torch.float32, device=labels.device).unbind()
    found = logits if need else None
    _run(logits, labels, loss, lse, found, torch.ones(()), form, ignored, statistics)
    return loss.sum()
