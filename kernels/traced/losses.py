"""The operators of the loss.

`linear_cross_entropy` computes the gradients in its forward pass, as the op does, and returns them
beside the loss; its backward scales them. Rows without a label are left out inside, so that no
shape of the graph depends on the labels: the hidden states' gradient has a zero row for each.
"""

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..ops import cross_entropy as op
from ..ops.cross_entropy.linear import Form, LinearCrossEntropy
from ..ops.frozen_linear.dense import Packed
from .library import Kept, apart, define, differentiable, gradient, operator_of
from .packed import parts, whole

FORM = "float? softcap, float label_smoothing, float z_loss, bool dft, int ignore_index"


def _loss(
    logits: Tensor,
    labels: Tensor,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    dft: bool,
    ignore_index: int,
) -> Tensor:
    total, _ = op.cross_entropy(
        logits,
        labels,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        dft=dft,
        ignore_index=ignore_index,
    )
    return total


differentiable(
    "cross_entropy",
    f"Tensor logits, Tensor labels, {FORM}",
    "Tensor",
    1,
    _loss,
    lambda logits, *rest: logits.new_empty((), dtype=torch.float32),
)


def cross_entropy(logits: Tensor, labels: Tensor, form: Form, ignore_index: int) -> tuple:
    """Return the summed loss, and the number of labels that count."""
    total = operator_of("cross_entropy")(logits, labels, *form, ignore_index)
    return total, (labels != ignore_index).sum()


def _loss_and_gradients(
    hidden: Tensor,
    held: list[Tensor],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    form: str,
    scaling: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    dft: bool,
    ignore_index: int,
    need: list[bool],
) -> list[Tensor]:
    """Return the loss and the gradients that are needed, of hidden, weight, A and B."""
    rows, chosen = op.label_rows(labels, hidden.device, ignore_index, rows)
    picked = hidden.index_select(0, rows)
    head = whole(held, form), lora_A, lora_B
    options = Form(softcap, label_smoothing, z_loss, dft), op.backend_for(picked), ignore_index
    ctx = Kept(needs_input_grad=need)
    total = LinearCrossEntropy.forward(ctx, picked, *head, scaling, chosen, *options)
    of_picked, *others = ctx.saved_tensors
    found = [total]
    if of_picked is not None:
        found.append(of_picked.new_zeros(hidden.shape).index_copy_(0, rows, of_picked))
    return apart([*found, *(g for g in others if g is not None)])


def _fake(
    hidden: Tensor,
    held: list[Tensor],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *_, need = rest
    found = [hidden.new_empty((), dtype=torch.float32)]
    if need[0]:
        found.append(hidden.new_empty(hidden.shape, dtype=dispatch.product_dtype(hidden)))
    for t, needed in zip((held[0], lora_A, lora_B), need[1:], strict=True):
        if needed and t is not None:
            found.append(t.new_empty(t.shape, dtype=torch.float32))
    return found


define(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor[] weight, Tensor? lora_A, Tensor? lora_B, Tensor labels, Tensor? rows, "
    f"str form, float scaling, {FORM}, bool[] need) -> Tensor[]",
    _loss_and_gradients,
    _fake,
)


def _keep(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    hidden, held, lora_A, lora_B, *_, ctx.need = inputs
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [None if t is None else t.dtype for t in (hidden, held[0], lora_A, lora_B)]
    ctx.parts, ctx.arguments = len(held), len(inputs)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple:
    found, scaled = iter(ctx.saved_tensors), []
    for dtype, needed in zip(ctx.dtypes, ctx.need, strict=True):
        # the gradient of the sum is one over the number of labels: fp32
        scaled.append((next(found).float() * grads[0]).to(dtype) if needed else None)
    hidden, weight, lora_A, lora_B = scaled
    of_parts = [weight, *[None] * (ctx.parts - 1)]
    return hidden, of_parts, lora_A, lora_B, *(None,) * (ctx.arguments - 4)


gradient("linear_cross_entropy", _keep, _backward)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Packed,
    labels: Tensor,
    rows: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
    form: Form,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss, and the number of labels that count."""
    flat, (held, name) = hidden.reshape(-1, hidden.shape[-1]), parts(weight)
    lora_A, lora_B, scaling = (None, None, 0.0) if lora is None else lora
    given = flat, held[0], lora_A, lora_B
    wanted = torch.is_grad_enabled()
    need = [wanted and t is not None and t.requires_grad for t in given]
    tensors = flat, held, lora_A, lora_B, labels.reshape(-1), rows
    found = operator_of("linear_cross_entropy")(*tensors, name, scaling, *form, ignore_index, need)
    return found[0], (labels != ignore_index).sum()
