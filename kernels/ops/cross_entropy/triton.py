"""Cross-entropy on a GPU: one program per row in forward, one per piece of a row in backward.

Forward reads the logits once, piece by piece, with the running maximum m and the sum s of
exp(z - m): one exponential a logit and one a piece. It keeps the log-sum-exp alone. Backward reads
the logits again and writes the gradient, over the logits where the caller gives them up.

A soft cap z = c tanh(x / c) has the slope 1 - (z / c)^2; tanh is 2 s(2x / c) - 1, s the sigmoid.
A vocabulary that is not a multiple of 16 would make every access one of 16 bits. Where the rows of
the logits lie a multiple of 16 apart, the padding between them is read too, and not used. In the
gradient, whose memory is made here, the padding is written with zeros.

Nothing here waits for the device: counts and scales stay there. So a label outside of the
vocabulary raises no error; it makes loss and gradient NaN.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from ..float8 import Float8Weight, ScaledRows, product, scaled_rows
from ..float8.reference import E4M3, LARGEST
from ..frozen_linear.dense import panels
from .linear import Form, Head, is_ready

BLOCK, THREADS = 4096, 256
LEAST = 2.0**-20  # a row's largest gradient, for its scale: what is smaller is what fp32 lost
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _capped(x, cap: tl.constexpr):
    if cap is None:
        return x
    else:
        return cap * (2 * tl.sigmoid(x * (2 / cap)) - 1)


@triton.jit
def _forward(
    LOGITS, LABELS, LOSS, LSE, TOLD, stride, V, padded, ignore_index: tl.constexpr,
    cap: tl.constexpr, smoothing: tl.constexpr, z_loss: tl.constexpr,
    dft: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row)
    if label == ignore_index:
        tl.store(LOSS + row, 0.0)
        tl.store(LSE + row, 0.0)
        if TOLD is not None:
            tl.store(TOLD + row, 0.0)
            tl.store(TOLD + tl.num_programs(0) + row, 0.0)
        return
    start_of_row = LOGITS + row * stride
    weighted = tl.full((), 0.0, tl.float32)
    top = tl.full((), float("-inf"), tl.float32)  # the largest logit, and that before the label
    before = tl.full((), float("-inf"), tl.float32)
    m = tl.full((), float("-inf"), tl.float32)
    s = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(start_of_row + columns, mask=columns < padded, other=0.0).to(tl.float32)
        z = _capped(x, cap)
        if smoothing != 0:
            total += tl.sum(tl.where(columns < V, z, 0.0))
        z = tl.where(columns < V, z, float("-inf"))
        largest = tl.maximum(m, tl.max(z))
        base = tl.where(largest == float("-inf"), 0.0, largest)  # so far nothing but -inf
        e = tl.exp2((z - base) * LOG2E)
        if TOLD is not None:
            top = tl.maximum(top, tl.max(tl.where(columns < V, x, float("-inf"))))
            earlier = tl.where(columns < label.to(tl.int32), x, float("-inf"))
            before = tl.maximum(before, tl.max(earlier))
            grown = tl.where(m == float("-inf"), 0.0, m - base)  # 0 * -inf would be none
            weighted = (weighted + s * grown) * tl.exp2(grown * LOG2E)
            weighted += tl.sum(e * tl.maximum(z - base, -1e4))
        s = s * tl.exp2((m - base) * LOG2E) + tl.sum(e)
        m = largest
    known = (label >= 0) & (label < V)
    of_label = tl.load(start_of_row + label, mask=known, other=0.0).to(tl.float32)
    lse = tl.where(known, m + tl.log2(s) * LN2, float("nan"))  # from where it reaches the gradient
    chosen = _capped(of_label, cap)
    loss = lse - (1 - smoothing) * chosen
    if smoothing != 0:
        loss -= smoothing * (total / V)
    if z_loss != 0:
        loss += z_loss * lse * lse
    if dft:
        loss *= tl.exp2((chosen - lse) * LOG2E)
    tl.store(LSE + row, lse)
    tl.store(LOSS + row, loss)
    if TOLD is not None:
        # log(s) - sum(e (z - m)) / s: two terms of which none is negative
        tl.store(TOLD + row, ((of_label == top) & (before < top)).to(tl.float32))
        tl.store(TOLD + tl.num_programs(0) + row, tl.log2(s) * LN2 - weighted / s)


@triton.jit
def _backward(
    LOGITS, LABELS, LSE, SCALE, GRAD, stride, grad_stride, V, padded, ignore_index: tl.constexpr,
    cap: tl.constexpr, smoothing: tl.constexpr, z_loss: tl.constexpr, dft: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < padded
    target = GRAD + row * grad_stride + columns
    label = tl.load(LABELS + row)
    if label == ignore_index:
        tl.store(target, tl.zeros((BLOCK,), GRAD.dtype.element_ty), mask=inside)
        return
    x = tl.load(LOGITS + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    z = _capped(x, cap)
    lse = tl.load(LSE + row)
    grad = tl.exp2((z - lse) * LOG2E)
    if z_loss != 0:
        grad = grad * (1 + 2 * z_loss * lse)
    grad = tl.where(columns == label.to(tl.int32), grad - (1 - smoothing), grad)
    if smoothing != 0:
        grad -= smoothing / V
    if cap is not None:
        part = z * (1 / cap)
        grad = grad * (1 - part * part)
    grad = grad * tl.load(SCALE + row if dft else SCALE)
    if PADDED:
        grad = tl.where(columns < V, grad, 0.0)
    tl.store(target, grad.to(GRAD.dtype.element_ty), mask=inside)


@triton.jit
def _rounded_gradient(
    LOGITS, LABELS, LSE, GRAD, SCALE, stride, V, ignore_index: tl.constexpr, floor: tl.constexpr,
    top: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient in e4m3; of none of a row is the magnitude more than the label's, 1 - p."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label, lse = tl.load(LABELS + row), tl.load(LSE + row)
    target = GRAD + row * V + columns
    if label == ignore_index:
        tl.store(SCALE + row, 1.0)
        tl.store(target, tl.zeros((BLOCK,), GRAD.dtype.element_ty), mask=columns < V)
        return
    known = (label >= 0) & (label < V)
    chosen = tl.load(LOGITS + row * stride + label, mask=known, other=0.0).to(tl.float32)
    largest = tl.maximum(1 - tl.exp2((chosen - lse) * LOG2E), floor)
    if tl.program_id(1) == 0:
        tl.store(SCALE + row, tl.div_rn(largest, top))
    x = tl.load(LOGITS + row * stride + columns, mask=columns < V, other=0.0).to(tl.float32)
    grad = tl.exp2((x - lse) * LOG2E)
    grad = tl.where(columns == label.to(tl.int32), grad - 1, grad) * tl.div_rn(top, largest)
    tl.store(target, grad.to(GRAD.dtype.element_ty), mask=columns < V)


def _padded(*tensors: Tensor) -> int:
    """Return how many columns of all of them [N, V] may be touched: V, or V and its padding."""
    V = tensors[0].shape[1]
    wide = -(-V // 16) * 16
    for x in tensors:
        last = x.storage_offset() + (len(x) - 1) * x.stride(0) + wide
        if x.stride(0) < wide or last * x.element_size() > x.untyped_storage().nbytes():
            return V
    return wide


def _padded_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an empty [rows, columns] whose rows begin at multiples of 16 values."""
    wide = -(-columns // 16) * 16
    return torch.empty((rows, wide), dtype=dtype, device=device)[:, :columns]


def loss_and_lse(
    logits: Tensor, labels: Tensor, form: Form, ignore_index: int, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the losses and log-sum-exps, fp32 [N], of logits [N, V] and labels int64 [N].

    The rows of the logits may lie apart. `statistics` are as in `cross_entropy`.
    """
    N, V = logits.shape
    loss, lse = torch.empty((2, N), dtype=torch.float32, device=logits.device).unbind()
    told = None if statistics is None else lse.new_empty((2, N))
    if N:
        dispatch.launch(
            _forward, (N,), logits, labels, loss, lse, told, logits.stride(0), V, _padded(logits),
            ignore_index, *form, BLOCK, num_warps=THREADS // dispatch.lanes(),
        )  # fmt: skip
    if N and statistics is not None and told is not None:
        statistics += told.sum(1)
    return loss, lse


def gradient(
    logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, form: Form, ignore_index: int,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return d (scale * sum of losses) / d logits, [N, V]; scale: fp32 [].

    It is written to `out` if that is given, which may be the logits themselves. Padding between the
    rows of `out` may be written.
    """
    N, V = logits.shape
    out = _padded_rows(N, V, logits.dtype, logits.device) if out is None else out
    padded = _padded(logits, out)
    if form.dft:
        scale = scale * _probabilities(logits, labels, lse, form.softcap)
    if N:
        dispatch.launch(
            _backward, (N, -(-V // BLOCK)), logits, labels, lse, scale, out, logits.stride(0),
            out.stride(0), V, padded, ignore_index, *form, padded > V, BLOCK,
            num_warps=THREADS // dispatch.lanes(),
        )  # fmt: skip
    return out


def _probabilities(logits: Tensor, labels: Tensor, lse: Tensor, cap: float | None) -> Tensor:
    """Return the probabilities of the labels, fp32 [N]; of one that is ignored, any number.

    They are taken before the gradient may be written over the logits.
    """
    words = labels.clamp(0, logits.shape[1] - 1)
    chosen = logits.gather(1, words[:, None])[:, 0].float()
    if cap is not None:
        chosen = cap * torch.tanh(chosen / cap)
    return (chosen - lse).exp()


def logits(h: Tensor, head: Head) -> Tensor:
    """Return h [n, H] times the transpose of the head [V, H]: [n, V] in h's dtype.

    The rows of the result lie a multiple of 16 values apart.
    """
    if isinstance(head, Float8Weight):  # which has a multiple of 16 words
        return product(scaled_rows([h], [None]), head)
    out = _padded_rows(len(h), head.shape[0], h.dtype, h.device)
    whole = [(slice(None), head)] if is_ready(head, h.dtype) else panels(head, h.dtype)
    for words, panel in whole:
        torch.mm(h, panel.t(), out=out[:, words])
    return out


@functools.cache
def _one(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), device=device)


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
    loss, lse = loss_and_lse(logits, labels, form, ignored, statistics)
    if need:
        gradient(logits, labels, lse, _one(logits.device), form, ignored, logits)
    return loss.sum()


def loss_and_rounded_gradient(
    logits: Tensor, labels: Tensor, ignored: int, statistics: Tensor | None = None
) -> tuple[Tensor, ScaledRows]:
    """Return the summed loss [] of logits [n, V] and labels int64 [n], and gradients in e4m3.

    A label `ignored` counts for nothing. `statistics` are as in `cross_entropy`.
    """
    loss, lse = loss_and_lse(logits, labels, Form(), ignored, statistics)
    n, V = logits.shape
    grad = torch.empty((n, V), dtype=E4M3, device=logits.device)
    scale = torch.empty((n, 1), dtype=torch.float32, device=logits.device)
    if n:
        dispatch.launch(
            _rounded_gradient, (n, -(-V // BLOCK)), logits, labels, lse, grad, scale,
            logits.stride(0), V, ignored, LEAST, LARGEST, BLOCK,
            num_warps=THREADS // dispatch.lanes(),
        )  # fmt: skip
    return loss.sum(), ScaledRows(grad, scale)
