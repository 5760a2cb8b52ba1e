"""AdamW in plain torch: over all tensors at once, or with 8-bit state one after another.

A step whose numbers lie on the device takes one tensor after another too, in parts. Each part is
computed in new memory and copied where the step is taken: so nothing has to be known on the host.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nf4 import ABSMAX_FLOOR
from .clipped import AdamWRow, ClippedAdamW
from .lists import Numbers, Update
from .remainder import PART, joined, parts, put
from .state import BLOCK, Map, Moment8bit, signed_map, unsigned_map


def adamw_step(update: Update[Tensor]) -> None:
    """Update all tensors at once, and others than fp32 in fp32."""
    params, grads, exp_avgs, exp_avg_sqs = update.lists
    decay, beta1, rest1, beta2, rest2, rate, correction, eps = update.numbers
    torch._foreach_mul_(exp_avgs, beta1)
    torch._foreach_add_(exp_avgs, grads, alpha=rest1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=rest2)
    denominator = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denominator, correction)
    torch._foreach_add_(denominator, eps)
    moved = torch._foreach_mul(exp_avgs, rate)
    torch._foreach_div_(moved, denominator)
    # a parameter in fp32 is its own copy
    wide = [_wide(p) for p in params]
    torch._foreach_mul_(wide, decay)
    torch._foreach_sub_(wide, moved)
    for p, new in zip(params, wide, strict=True):
        if p is not new:
            p.copy_(new)


def adamw_step_8bit(update: Update[Moment8bit]) -> None:
    """Update one tensor after another.

    Products and sums are operations of their own, in the order of the kernel: torch's fused ones
    round differently on every processor, and the codes should not depend on it.
    """
    decay, beta1, rest1, beta2, rest2, rate, correction, eps = update.numbers
    for p, g, exp_avg, exp_avg_sq in zip(*update.lists, strict=True):
        first, second = signed_map(p.device), unsigned_map(p.device)
        g = g.reshape(-1).float()
        m = dequantize(exp_avg, first) * beta1 + g * rest1
        v = dequantize(exp_avg_sq, second) * beta2 + g * g * rest2
        moved = rate * m / (v.sqrt() * correction + eps)
        p.copy_((p.reshape(-1).float() * decay - moved).view_as(p))
        quantize(m, first, exp_avg)
        quantize(v, second, exp_avg_sq)


def dequantize(moment: Moment8bit, code_map: Map) -> Tensor:
    """Return the values, fp32 [n]."""
    values = code_map.levels.index_select(0, moment.codes.int())
    return values * moment.absmax.repeat_interleave(BLOCK)[: len(values)]


def quantize(x: Tensor, code_map: Map, moment: Moment8bit) -> None:
    """Write x fp32 [n] into `moment`."""
    blocks = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    over = 1 / torch.where(absmax < ABSMAX_FLOOR, ABSMAX_FLOOR, absmax)
    codes = torch.bucketize(blocks * over[:, None], code_map.edges[1:], out_int32=True)
    moment.codes.copy_(codes.view(-1)[: len(x)])
    moment.absmax.copy_(absmax)


def clipped_step(step: ClippedAdamW, rows: Sequence[AdamWRow], losses: Tensor) -> Tensor:
    """Take the step of all rows if it is finite, and return what is told of it."""
    norms = torch._foreach_norm([_wide(row.grad) for row in rows])
    by_group = sorted(range(len(rows)), key=lambda i: rows[i].group)
    norm = torch.linalg.vector_norm(torch.stack([norms[i] for i in by_group])).float()
    place = torch.arange(len(rows), device=norm.device)
    first = torch.where(torch.stack(norms).isfinite(), len(rows), place).min()
    first = torch.where(first < len(rows), first, -1)
    told = _decide(step, norm, first, losses)
    take(step, rows)
    return told


def _decide(step: ClippedAdamW, norm: Tensor, first: Tensor, losses: Tensor) -> Tensor:
    """Write the numbers of the step, and count it."""
    fine = norm.isfinite() & losses.isfinite().all()
    row = step.counters.clamp(max=len(step.by_step) - 1)
    lr, decay = step.by_step.index_select(0, row[:1])[0].unbind(1)
    bias, correction = step.by_taken.index_select(0, row[1:])[0].unbind(1)
    factor = (step.max_norm / (norm + 1e-6)).clamp(max=1.0)
    for column, value in enumerate((decay, *[None] * 4, lr / bias, correction, None, factor, fine)):
        if value is not None:
            step.numbers[:, column].copy_(value)
    step.counters[0].add_(1)
    step.counters[1].add_(fine)
    return torch.cat([torch.stack([norm, fine.float(), first.float()]), losses])


def take(step: ClippedAdamW, rows: Sequence[AdamWRow]) -> None:
    """Update the parameters of rows by the numbers of `step`, if it is to be taken."""
    for row in rows:
        (beta1, beta2), eps = step.groups[row.group].betas, step.groups[row.group].eps
        decay, *_, rate, correction, _, factor, taken = step.numbers[row.group].unbind()
        betas = beta1, 1 - beta1, beta2, 1 - beta2
        numbers = Numbers(decay, *betas, rate, correction, eps)
        for part in parts(row, PART):
            _, p, g, m, v, remainder = part
            x = p.clone() if remainder is None else joined(p, remainder)
            new = Update([x], [_wide(g) * factor], [_copy(m)], [_copy(v)], numbers)
            (adamw_step_8bit if isinstance(m, Moment8bit) else adamw_step)(new)
            moments = (*_tensors(new.exp_avgs[0]), *_tensors(new.exp_avg_sqs[0]))
            for old, each in zip((*_tensors(m), *_tensors(v)), moments, strict=True):
                old.copy_(torch.where(taken != 0, each, old))
            if remainder is None:
                p.copy_(torch.where(taken != 0, x, p))
            else:
                put(torch.where(taken != 0, x, joined(p, remainder)), p, remainder)


def _tensors(moment: Tensor | Moment8bit) -> tuple[Tensor, ...]:
    return tuple(moment) if isinstance(moment, Moment8bit) else (moment,)


def _wide(t: Tensor) -> Tensor:
    """Return a tensor in fp32 at least: itself, if it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _copy(value: Tensor | Moment8bit) -> Any:
    return Moment8bit(*map(torch.clone, value)) if isinstance(value, Moment8bit) else value.clone()
