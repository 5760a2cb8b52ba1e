"""AdamW and learning-rate schedules.

`AdamW` has torch's param_groups, state and state_dict; its step is `kernels.adamw_step` over all
the tensors of a group. A schedule is a function of the step alone: nothing to save, nothing to
resume.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .config import LorakitError
from .kernels import adamw_step


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101); fp32 state beside every parameter."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise LorakitError(
                f"AdamW: lr, eps and weight_decay must not be negative and betas be in [0, 1): "
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            group["step"] += 1
            adamw_step(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                step=group["step"],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        return loss


def learning_rate(kind: str, step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """The rate of step 0 <= step < total: a linear warm-up to `peak`, then by kind.

    "constant" stays; "linear" falls to 0 at `total`; "cosine" falls to 0 along half a cosine. The
    warm-up takes ceil(warmup_ratio * total) steps, and its first is not zero.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    falls = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return peak * falls[kind]
