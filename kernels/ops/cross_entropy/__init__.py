"""Next-token cross-entropy, summed over the labels that count; alone, and fused with the head.

With logits z and label y, in fp32,

    loss = logsumexp(z) - z_y          d loss / d z = softmax(z) - onehot(y)

A soft cap c (Gemma 2) replaces z by c tanh(z / c), of slope 1 - tanh^2(z / c). Label smoothing e
(arXiv:1512.00567) wants a share e of the probability spread over all V words, and the z-loss a
(arXiv:2204.02311, section 5) keeps the normalizer near 1:

    loss = logsumexp(z) - (1 - e) z_y - e mean(z) + a logsumexp(z)^2
    d loss / d z = softmax(z) (1 + 2 a logsumexp(z)) - (1 - e) onehot(y) - e / V

Dynamic fine-tuning (DFT, arXiv:2508.05629) weighs the loss of a token by the probability of its
label, which counts as a constant:

    loss = p loss,   d loss / d z = p d loss / d z       p = exp(z_y - logsumexp(z))

Both functions return the sum and the number of labels that were not `ignore_index`, so that a
caller can add up micro-batches of different length and divide once: a mean of means gives short
batches too much weight.

Both tell, if they are asked, how often the label is the likeliest word, and the entropy of the
predictions, -sum(p log p). Kernels find both in the pass that sums the exponentials.

`linear_cross_entropy` takes the hidden states instead of the logits. The logits of a large
vocabulary are the biggest tensor of a training step (T x V x 4 bytes: 0.8 GB for 4096 tokens of a
49,152-word model). So it walks over the rows in chunks (24 MB of logits, on a GPU 256), and
computes the gradient in the forward pass, while a chunk's logits are at hand; backward only scales
it. The price: a gradient is computed even if backward never runs, unless gradients are disabled.

A head with a low-rank update, W + s B A, gets it chunk by chunk (`lora_linear` has the formulas).

A packed head (NF4 or int8) is dequantized some thousand rows of the vocabulary at a time, and the
dense head never exists: twice for every chunk, for the logits and for the gradient. A head in 16
bits becomes fp32 in this way too, where the processor has no products of 16 bits.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ... import dispatch
from ...autograd import once_differentiable
from ..float8 import Float8Weight
from ..frozen_linear.dense import Packed
from . import cpu, reference
from .linear import Form, LinearCrossEntropy


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dft: bool = False,
    ignore_index: int = -100,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of next-token logits, summed over the labels that count.

    Differentiable in the logits; it keeps them for backward.

    Args:
        logits: z [..., V], before any soft cap, of any floating-point dtype; kernels run for fp32,
            bf16 and fp16.
        labels: y, int64 [...].
        softcap: c; z becomes c tanh(z / c) (arXiv:2408.00118).
        label_smoothing: e, the share of the probability that is spread over all V words
            (arXiv:1512.00567).
        z_loss: a, the weight of logsumexp(z)^2 in the loss (arXiv:2204.02311, section 5).
        dft: whether the loss of a label is weighed by its probability p (arXiv:2508.05629).
        ignore_index: the label that does not count.
        statistics: fp32 [2], where the logits lie. To it are added the number of labels that are
            the likeliest word, the first of equals, and the entropies of the predictions in nats,
            summed over the labels that count. None, and under torch.compile: nothing is.

    Returns:
        The summed loss in nats, fp32 [], and the number of labels that count, int64 [].

    Raises:
        IndexError: on a CPU, a label is outside of the vocabulary. On a GPU, where nothing waits
            for the device, the loss is NaN instead.
    """
    form = Form(softcap, label_smoothing, z_loss, dft)
    if dispatch.traces():
        return dispatch.traced().cross_entropy(logits, labels, form, ignore_index)
    backend = backend_for(logits) if labels.shape == logits.shape[:-1] else reference
    if backend is reference:
        return reference.cross_entropy(logits, labels, form, ignore_index, statistics)
    flat, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).contiguous()
    total = CrossEntropy.apply(flat, labels, form, ignore_index, backend, statistics)
    return total, (labels != ignore_index).sum()


class CrossEntropy(torch.autograd.Function):
    """Map logits [N, V] and labels int64 [N] to the summed loss, fp32 []."""

    @staticmethod
    def forward(ctx, logits, labels, form, ignore_index, backend, statistics):
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        loss, lse = backend.loss_and_lse(logits, labels, form, ignore_index, statistics)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options, ctx.backend = (form, ignore_index), backend
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, labels, lse = ctx.saved_tensors
        return ctx.backend.gradient(logits, labels, lse, grad, *ctx.options), *(None,) * 5


def token_cross_entropy(logits: Tensor, labels: Tensor, *, softcap: float | None = None) -> Tensor:
    """Compute the cross-entropy of next-token logits, token by token.

    Differentiable in the logits; it keeps them for backward.

    Args:
        logits: z [N, V], before any soft cap, of any floating-point dtype; kernels run for fp32,
            bf16 and fp16.
        labels: y, int64 [N], where the logits lie; each a word.
        softcap: as in `cross_entropy`.

    Returns:
        The losses in nats, fp32 [N].

    Raises:
        IndexError: as in `cross_entropy`.
    """
    form = Form(softcap)
    backend = reference if dispatch.traces() else backend_for(logits)
    if backend is reference:
        return reference.token_cross_entropy(logits, labels, form)
    return TokenCrossEntropy.apply(logits, labels, form, backend)


class TokenCrossEntropy(torch.autograd.Function):
    """Map logits [N, V] and labels int64 [N] to the losses, fp32 [N]."""

    @staticmethod
    def forward(ctx, logits, labels, form, backend):
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        loss, lse = backend.loss_and_lse(logits, labels, form, -100)
        ctx.save_for_backward(logits, labels, lse)
        ctx.form, ctx.backend = form, backend
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, labels, lse = ctx.saved_tensors
        one = torch.ones((), device=logits.device)
        found = ctx.backend.gradient(logits, labels, lse, one, ctx.form, -100)
        return found.mul_(grad[:, None]), None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Packed | Float8Weight,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dft: bool = False,
    ignore_index: int = -100,
    statistics: Tensor | None = None,
    parts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of the logits hidden weight^T, which never exist all at once.

    Differentiable in hidden, in a dense weight, and in A and B.

    Args:
        hidden: [..., H], any floating-point dtype; kernels run for fp32, bf16 and fp16.
        weight: the head [V, H], dense, packed or in float8, which takes hidden states in bf16.
        labels: int64 [...], perhaps in host memory, where nothing waits for a GPU to count them.
            Rows whose label is `ignore_index` are left out before the product.
        rows: int64 [n], all different, the rows of hidden whose labels [n] these are; a label of
            `ignore_index` does nothing. All shapes are known then. None looks at the labels.
        lora: A [r, H], B [V, r] and s of a head weight + s B A; None for the head alone.
        softcap: as in `cross_entropy`.
        label_smoothing: as in `cross_entropy`.
        z_loss: as in `cross_entropy`.
        dft: as in `cross_entropy`.
        ignore_index: the label that does not count.
        statistics: as in `cross_entropy`.
        parts: how many of the labels that count belong to each part of the rows, in order, or None.

    Returns:
        The summed loss in nats, fp32 [], of parts those of each [parts]; and the number of labels
        that count, int64 [], where the labels lie.

    Raises:
        IndexError: as in `cross_entropy`.
        ValueError: the head is without its mean row, and there is a soft cap or a z-loss; or parts
            have a head that is learned, or are not of all labels.
    """
    form = Form(softcap, label_smoothing, z_loss, dft)
    if dispatch.traces() and parts is None:
        given = hidden, weight, labels, rows, lora, form, ignore_index
        return dispatch.traced().linear_cross_entropy(*given)
    picked, chosen = labelled(hidden, labels, ignore_index, rows)
    lora_A, lora_B, scaling = (None, None, 0.0) if lora is None else lora
    head: tuple[Tensor | Packed | Float8Weight | None, ...] = weight, lora_A, lora_B
    if not torch.is_grad_enabled():  # no gradient while the logits are at hand, then
        head = tuple(t.detach() if isinstance(t, Tensor) else t for t in head)
    backend = backend_for(picked)
    if backend is cpu and isinstance(weight, Float8Weight):
        backend = reference
    _check_parts(parts, len(chosen), weight, lora)
    options = form, backend, ignore_index, statistics, parts
    total = LinearCrossEntropy.apply(picked, *head, scaling, chosen, *options)
    return total, (labels != ignore_index).sum()


def _check_parts(
    parts: Sequence[int] | None, count: int, weight: object, lora: object | None
) -> None:
    """Raise ValueError unless parts are of `count` labels, and the head has no gradients."""
    if parts is None:
        return
    if dispatch.traces() or lora is not None:
        raise ValueError("the losses of parts take no low-rank update and no torch.compile")
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError("the losses of parts take a frozen head")
    if sum(parts) != count:
        raise ValueError(f"parts of {sum(parts)} labels, and {count} count")


def labelled(
    hidden: Tensor, labels: Tensor, ignore_index: int = -100, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pick the hidden states that have a label, and the labels.

    Nothing waits for a GPU if the labels lie in host memory.

    Args:
        hidden: [..., H].
        labels: int64 [...], where `hidden` lies or in host memory.
        ignore_index: the label that does not count.
        rows: as in `linear_cross_entropy`.

    Returns:
        The n hidden states [n, H] and labels int64 [n], both where `hidden` lies.
    """
    rows, chosen = label_rows(labels, hidden.device, ignore_index, rows)
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows), chosen


def label_rows(
    labels: Tensor, device: torch.device, ignore_index: int, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the rows that have a label and the labels, both int64 [n] on `device`.

    `rows` are given already, or None: then the labels [...] are looked at.
    """
    flat = labels.reshape(-1)
    if rows is None:
        rows = (flat != ignore_index).nonzero()[:, 0]
        flat = flat[rows]
    return dispatch.sent(rows, device), dispatch.sent(flat, device)


def backend_for(x: Tensor) -> ModuleType:
    """Return the backend of a loss of x, which are logits or hidden states."""
    floats = x.dtype in dispatch.FLOATS
    return dispatch.backend(__package__, x.device, cpu=cpu.fits(x), triton=floats)
