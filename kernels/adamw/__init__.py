"""One step of AdamW (arXiv:1711.05101) over a list of tensors.

    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
    p <- p (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

Weight decay is decoupled: it shrinks p and never enters m or v. LoRA has hundreds of small tensors,
so the step goes over all of them at once; a loop would pay a dozen launches for each.
"""

from torch import Tensor

from .. import dispatch
from . import reference


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update params, exp_avgs (m) and exp_avg_sqs (v) in place; `step` t counts from 1."""
    tensors = params, grads, exp_avgs, exp_avg_sqs
    if params and dispatch.triton_runs(params[0]):
        from . import triton

        if triton.fits(*tensors):
            with dispatch.on_device(params[0]):
                triton.adamw_step(*tensors, step, lr, betas, eps, weight_decay)
            return
    reference.adamw_step(*tensors, step, lr, betas, eps, weight_decay)
