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
    code = #{edges < scaled}                    after it; edges are the midpoints of the levels

m has the signed "dynamic" map, v the unsigned one (`state.py`): 64 levels of each sign, or 128, in
the decade below absmax and half as many in each decade below that, down to 5.5e-7 and 3.25e-7 of
absmax. p moves by the new m and v as they are before they are rounded.

Layout and maps are bitsandbytes', and so are the codes but for one rule. The nearest level of a v
below 1.6e-7 absmax is 0, and the next step would divide an m that is not 0 by little more than eps:
where a gradient is 1/5000 of the block's largest, m has a level of its own and v has none.
bitsandbytes lets that happen. Here v is rounded up to the lowest level above 0, so that such a
parameter moves too little instead of too far. (Its CUDA kernel also moves the code of a small
negative m away from 0, but not that of a positive one; here m has the nearest level.)

A NaN or an infinity in the gradient makes absmax of its block the same: from the next step on all
256 parameters of the block are NaN, where fp32 state loses one. (bitsandbytes' CUDA kernel forgets
the state of such a parameter, and says nothing.)
"""

from collections.abc import Callable, Iterator
from types import ModuleType

from torch import Tensor

from ... import dispatch
from . import cpu, reference
from .lists import Options, fits, fits_8bit
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
) -> None:
    """Update params, exp_avgs (m) and exp_avg_sqs (v) in place; `step` t counts from 1."""
    tensors = params, grads, exp_avgs, exp_avg_sqs
    if not params:
        return
    with dispatch.on_device(params[0]):
        for backend, some in _by_backend(fits, *tensors):
            backend.adamw_step(*some, Options(step, lr, betas, eps, weight_decay))


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
) -> None:
    """As `adamw_step`, with 8-bit exp_avgs and exp_avg_sqs: `Moment8bit.zeros` before step 1.

    params and grads may have any floating-point dtype and strides; the arithmetic is in fp32.
    Raises RuntimeError for a moment that is not as long as its parameter.
    """
    tensors = params, grads, exp_avgs, exp_avg_sqs
    if not params:
        return
    with dispatch.on_device(params[0]):
        for backend, some in _by_backend(fits_8bit, *tensors):
            backend.adamw_step_8bit(*some, Options(step, lr, betas, eps, weight_decay))


def _by_backend(
    fit: Callable[..., bool], *tensors: list
) -> Iterator[tuple[ModuleType, tuple[list, ...]]]:
    """The backends that take part, and what each of them updates. Which one a parameter gets
    depends on nothing but its own tensors: whatever else is in the lists, its bits are the same.
    """
    backend = _backend(tensors[0][0])
    if backend is reference or fit(*tensors, alignment=backend.ALIGNMENT):
        yield backend, tensors
        return
    device = tensors[0][0].device
    rows = {backend: [], reference: []}
    for row in zip(*tensors, strict=True):
        alone = fit(*([part] for part in row), alignment=backend.ALIGNMENT)
        rows[backend if alone and row[0].device == device else reference].append(row)
    for each, some in rows.items():
        if some:
            yield each, tuple(map(list, zip(*some, strict=True)))


def _backend(p: Tensor) -> ModuleType:
    picked = dispatch.pick(p.device, "cpu", "triton")
    if picked == "triton":
        from . import triton

        return triton
    return cpu if picked == "cpu" else reference
