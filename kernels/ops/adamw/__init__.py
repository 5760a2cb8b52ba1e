"""One step of AdamW (arXiv:1711.05101) over a list of tensors, with fp32 or 8-bit state.

    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
    p <- p (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

Weight decay is decoupled: it shrinks p and never enters m or v. LoRA has hundreds of small tensors,
so the step goes over all of them at once; a loop would pay a dozen launches for each.

8-bit state
-----------
m and v are kept in 8 bits between the steps (arXiv:2110.02861), 2.03 bytes per parameter instead of
8. A tensor is flattened row-major and cut into blocks of 256; the last one may be short. A block is
scaled by its largest magnitude, absmax, and every value becomes the nearest of 256 levels:

    x = LEVELS[code] * absmax[i // 256]         before the step, whose arithmetic is in fp32
    absmax = max |x|,  scaled = x * (1 / absmax)
    code = #{edges < scaled}                    after the step; edges: midpoints of the levels

m has the signed "dynamic" map, v the unsigned one (`state.py`): 64 levels of each sign, or 128, in
the decade below absmax and half as many in each decade below that, down to 5.5e-7 and 3.25e-7 of
absmax. p moves by the new m and v as they are before they are rounded.

Layout and maps are bitsandbytes', and so are the codes, with one exception. The nearest level of a
v below 1.6e-7 absmax is 0, and the next step would divide an m that is not 0 by little more than
eps: where a gradient is 1/5000 of the block's largest, m has a level of its own and v has none.
bitsandbytes lets that happen. Here v is rounded up to the lowest level above 0, so that such a
parameter moves too little instead of too far. (The CUDA kernel of bitsandbytes also moves the code
of a small negative m away from 0, but not that of a positive one; here m has the nearest level.)

Parameters in bfloat16
----------------------
A step is too small for the 8 bits of a bf16 number. With `remainders`, int16 tensors beside such
parameters, the steps are those of fp32 parameters, to the bit (remainder.py). Without them p is
rounded to its dtype after each step.

A NaN or an infinity in the gradient makes absmax of its block NaN or infinite too: from the next
step on all 256 parameters of the block are NaN, where fp32 state loses one. (The CUDA kernel of
bitsandbytes forgets the state of such a parameter, and says nothing.)
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor

from ... import dispatch
from . import reference
from .lists import AdamWOptions, M, Update, fits, fits_8bit, numbers
from .remainder import in_fp32
from .state import Moment8bit


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
    remainders: list[Tensor] | None = None,
) -> None:
    """Update parameters and their fp32 state in place by one step of AdamW (arXiv:1711.05101).

    The four lists are of one length; entries that go together have one shape. The kernels take
    dense fp32 tensors; the reference updates the others, also of the same lists.

    Args:
        params: the parameters p, any shapes.
        grads: their gradients g.
        exp_avgs: their first moments m; zeros before step 1.
        exp_avg_sqs: their second moments v; zeros before step 1.
        step: t, counted from 1.
        lr: the learning rate.
        betas: b1 and b2, the decay rates of m and v.
        eps: what is added to the root of v.
        weight_decay: wd, the share of p that lr times it takes away.
        remainders: what bf16 parameters leave out of fp32, int16 of their shapes; zeros before
            step 1. None rounds parameters to their dtype.
    """
    if params:
        options = AdamWOptions(step, lr, betas, eps, weight_decay)
        update = Update(params, grads, exp_avgs, exp_avg_sqs, numbers(options))
        for each in [update] if remainders is None else in_fp32(update, remainders):
            for backend, part in _by_backend(each, fits):
                backend.adamw_step(part)


def adamw_step_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Moment8bit],
    exp_avg_sqs: list[Moment8bit],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    remainders: list[Tensor] | None = None,
) -> None:
    """Update parameters and their 8-bit state in place by one step of AdamW (arXiv:2110.02861).

    The arithmetic is in fp32.

    Args:
        params: the parameters p, of any floating-point dtype and strides.
        grads: their gradients g, of any floating-point dtype and strides.
        exp_avgs: their first moments m; `Moment8bit.zeros` before step 1.
        exp_avg_sqs: their second moments v; `Moment8bit.zeros` before step 1.
        step: t, counted from 1.
        lr: the learning rate.
        betas: b1 and b2, the decay rates of m and v.
        eps: what is added to the root of v.
        weight_decay: wd, the share of p that lr times it takes away.
        remainders: what bf16 parameters leave out of fp32, int16 of their shapes; zeros before
            step 1. None rounds parameters to their dtype.

    Raises:
        RuntimeError: a moment is not as long as its parameter.
    """
    if params:
        options = AdamWOptions(step, lr, betas, eps, weight_decay)
        update = Update(params, grads, exp_avgs, exp_avg_sqs, numbers(options))
        for each in [update] if remainders is None else in_fp32(update, remainders):
            for backend, part in _by_backend(each, fits_8bit):
                backend.adamw_step_8bit(part)


def _by_backend(
    update: Update[M], fits: Callable[..., bool]
) -> Iterator[tuple[ModuleType, Update[M]]]:
    """Yield the backends that take part, and what each of them updates.

    Which one a parameter gets depends on nothing but its own tensors: whatever else is in the
    lists, its bits are the same.
    """
    device = update.params[0].device
    backend = dispatch.backend(__package__, device)
    if backend is reference or fits(*update.lists, alignment=backend.ALIGNMENT):
        yield backend, update
        return
    rows: dict[ModuleType, list[tuple[Any, ...]]] = {backend: [], reference: []}
    for row in zip(*update.lists, strict=True):
        alone = fits(*([part] for part in row), alignment=backend.ALIGNMENT)
        rows[backend if alone and row[0].device == device else reference].append(row)
    for each, some in rows.items():
        if some:
            p, g, m, v = (list(column) for column in zip(*some, strict=True))
            yield each, Update(p, g, m, v, update.numbers)
