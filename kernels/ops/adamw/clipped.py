"""A step of AdamW over all groups with clipped gradients, whose numbers lie on the device.

    n = |g| over all tensors,  c = min(1, max_norm / (n + 1e-6))      (torch's clip_grad_norm_)
    if n and the losses are finite: the step of __init__.py with c g for g; else nothing changes

The host reads nothing and gives no number that changes from one step to the next. So it never waits
for the device, and a CUDA graph may hold the step. What such a graph would bake in lies in tensors:

    counters    int64 [2]           the steps begun since the object was made, and those taken
    by_step     fp64 [S, G, 2]      lr and 1 - lr wd of each group, in the row of the steps begun
    by_taken    fp64 [S, G, 2]      1 - b1^t and 1 / sqrt(1 - b2^t), in the row of the steps taken
    numbers     fp32 [G, 10]        decay, beta1, rest1, beta2, rest2, rate, correction, eps of this
                                    step, c, and 1 where the step is taken, else 0
    told        fp32 [3 + n]        the norm, whether the step is taken, the place of the first
                                    tensor that is not finite or -1, and the n losses

The numbers are those that the host would compute, to the bit: in fp64, rounded to fp32 once.

On a GPU a step is three launches, and one more if there are tensors with 8-bit state. One kernel
adds up squares, a number for each piece of a gradient; one program adds these in a fixed order and
decides; one kernel updates. Nothing is added atomically, so the bits are the same every time. A
gradient is read twice and never written; clipping in memory would write it too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from .lists import Work, is_dense, moment_fits
from .state import Moment8bit


class AdamWGroup(NamedTuple):
    """What is the same for all parameters of a group, in every step.

    Attributes:
        step: the number of steps taken so far.
        betas: b1 and b2, the decay rates of m and v.
        eps: what is added to the root of v.
        weight_decay: wd, the share of p that lr times it takes away.
    """

    step: int
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class AdamWRow(NamedTuple):
    """A parameter of a step.

    Attributes:
        group: the number of its group.
        param: p, any shape.
        grad: g, of the same shape.
        exp_avg: m, fp32 of the same shape, or in 8 bits.
        exp_avg_sq: v, likewise.
        remainder: what p in bfloat16 leaves out, int16 of the same shape; None with other dtypes.
    """

    group: int
    param: Tensor
    grad: Tensor
    exp_avg: Tensor | Moment8bit
    exp_avg_sq: Tensor | Moment8bit
    remainder: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the row: p, g, those of m and v, and the remainder."""
        moments = (self.exp_avg, self.exp_avg_sq)
        each = [t for m in moments for t in (m if isinstance(m, Moment8bit) else (m,))]
        remainder = () if self.remainder is None else (self.remainder,)
        return self.param, self.grad, *each, *remainder

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether the state is in 8 bits, and whether there is a remainder."""
        return isinstance(self.exp_avg, Moment8bit), self.remainder is not None

    def fits(self, alignment: int) -> bool:
        """Return whether the kernels take the row, its tensors dense and on so many bytes."""
        p, halves = self.param, self.remainder is not None
        kind = torch.bfloat16 if halves else torch.float32
        own = [(p, kind), (self.grad, kind)]
        if self.remainder is not None:
            own.append((self.remainder, torch.int16))
        return all(
            is_dense(t, dtype, p.device, alignment) and t.shape == p.shape for t, dtype in own
        ) and all(moment_fits(m, p, alignment) for m in (self.exp_avg, self.exp_avg_sq))


class ClippedAdamW:
    """Steps of AdamW over all groups, with clipped gradients; see the module.

    Attributes:
        counters: int64 [2], the steps begun and the steps taken since then.
        numbers: fp32 [G, 10], of the last step; column 8 is what its gradients were clipped by.
        work: what the kernels read beside, of the last step. A graph that holds a step needs it.

    Args:
        groups: the G groups.
        rates: for each step the learning rates of the G groups; the last ones stay.
        max_norm: the norm that longer gradients are shortened to.
        device: where all tensors lie.
    """

    def __init__(
        self,
        groups: Sequence[AdamWGroup],
        rates: Sequence[Sequence[float]],
        max_norm: float,
        device: torch.device,
    ):
        self.groups, self.max_norm = list(groups), float(max_norm)
        by_step = [
            [(lr, 1 - lr * group.weight_decay) for lr, group in zip(row, groups, strict=True)]
            for row in rates
        ]
        by_taken = [[_biases(group, i + 1) for group in groups] for i in range(len(rates))]
        constants = [
            [0.0, b1, 1 - b1, b2, 1 - b2, 0.0, 0.0, eps, 0.0, 0.0] for _, (b1, b2), eps, _ in groups
        ]

        def sent(values: object, dtype: torch.dtype) -> Tensor:
            return dispatch.sent(torch.tensor(values, dtype=dtype, device="cpu"), device)

        self.by_step = sent(by_step, torch.float64)
        self.by_taken = sent(by_taken, torch.float64)
        self.numbers = sent(constants, torch.float32)
        self.counters = sent([0, 0], torch.int64)
        self.work: dict[str, Work] = {}

    def __call__(self, rows: Sequence[AdamWRow], losses: Tensor) -> Tensor:
        """Take a step, if gradients and losses are finite.

        Args:
            rows: the parameters that have gradients, in the order in which one is looked for that
                is not finite.
            losses: fp32 [n].

        Returns:
            `told` of the module, fp32 [3 + n], in new memory.
        """
        backend = dispatch.backend(__package__, self.numbers.device, cpu=False)
        return backend.clipped_step(self, rows, losses)


def _biases(group: AdamWGroup, steps: int) -> tuple[float, float]:
    t, (beta1, beta2) = group.step + steps, group.betas
    return 1 - beta1**t, 1 / math.sqrt(1 - beta2**t)
