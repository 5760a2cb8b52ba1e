"""AdamW in plain torch: over all tensors at once, or with 8-bit state one after another."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nf4 import ABSMAX_FLOOR
from .lists import Update
from .state import BLOCK, Map, Moment8bit, signed_map, unsigned_map


def adamw_step(update: Update[Tensor]) -> None:
    """Update all tensors at once."""
    params, grads, exp_avgs, exp_avg_sqs = update.lists
    step, lr, (beta1, beta2), eps, weight_decay = update.options
    torch._foreach_mul_(exp_avgs, beta1)
    torch._foreach_add_(exp_avgs, grads, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    denominator = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denominator, 1 / math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominator, eps)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(params, exp_avgs, denominator, value=-lr / (1 - beta1**step))


def adamw_step_8bit(update: Update[Moment8bit]) -> None:
    """Update one tensor after another.

    Products and sums are operations of their own, in the order of the kernel: torch's fused ones
    round differently on every processor, and the codes should not depend on it.
    """
    step, lr, (beta1, beta2), eps, weight_decay = update.options
    rate, correction = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    for p, g, exp_avg, exp_avg_sq in zip(*update.lists, strict=True):
        first, second = signed_map(p.device), unsigned_map(p.device)
        g = g.reshape(-1).float()
        m = dequantize(exp_avg, first) * beta1 + g * (1 - beta1)
        v = dequantize(exp_avg_sq, second) * beta2 + g * g * (1 - beta2)
        moved = rate * m / (v.sqrt() * correction + eps)
        p.copy_((p.reshape(-1).float() * (1 - lr * weight_decay) - moved).view_as(p))
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
