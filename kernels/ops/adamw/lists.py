"""One step over lists of tensors, and what a compiled kernel gets of it."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ... import dispatch
from .state import BLOCK, Moment8bit

M = TypeVar("M", Tensor, Moment8bit)


class AdamWOptions(NamedTuple):
    """The numbers of a step, which is counted from 1."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Numbers(NamedTuple):
    """The numbers of a step as the formulas take them: floats, or fp32 tensors of one value.

    decay = 1 - lr wd, rest = 1 - beta, rate = lr / (1 - b1^t), correction = 1 / sqrt(1 - b2^t).
    beta, rest and eps are always floats.
    """

    decay: float | Tensor
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    rate: float | Tensor
    correction: float | Tensor
    eps: float


@dataclass(slots=True)
class Update(Generic[M]):
    """One step over lists of one length: what every backend's `adamw_step` gets.

    The moments are fp32 tensors, or 8-bit ones for `adamw_step_8bit`.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[M]
    exp_avg_sqs: list[M]
    numbers: Numbers

    @property
    def lists(self) -> tuple[list[Any], ...]:
        """The four lists, in the order of the fields."""
        return self.params, self.grads, self.exp_avgs, self.exp_avg_sqs


def fits(*lists: list[Tensor], alignment: int) -> bool:
    """Return whether the kernels for fp32 state take the lists.

    All tensors are fp32, dense, aligned to so many bytes and on one device, and those that go
    together have one shape.
    """
    device = lists[0][0].device
    dense = all(is_dense(t, torch.float32, device, alignment) for tensors in lists for t in tensors)
    return dense and all(len({t.shape for t in group}) == 1 for group in zip(*lists, strict=True))


def fits_8bit(
    params: list[Tensor], grads: list[Tensor], *moments: list[Moment8bit], alignment: int
) -> bool:
    """Return whether the kernels for 8-bit state take the lists.

    params and grads are as in `fits`, and the moments as long as they have to be.
    """
    return fits(params, grads, alignment=alignment) and all(
        moment_fits(moment, p, alignment)
        for of_all in moments
        for p, moment in zip(params, of_all, strict=True)
    )


def moment_fits(moment: Tensor | Moment8bit, p: Tensor, alignment: int) -> bool:
    """Return whether the kernels take a moment, of either kind, beside parameter p."""
    if isinstance(moment, Tensor):
        same = moment.shape == p.shape
        return same and is_dense(moment, torch.float32, p.device, alignment)
    return (
        moment.codes.numel() == p.numel()
        and moment.absmax.numel() == -(-p.numel() // BLOCK)
        and is_dense(moment.codes, torch.uint8, p.device, alignment)
        and is_dense(moment.absmax, torch.float32, p.device, alignment)
    )


def is_dense(t: Tensor, dtype: torch.dtype, device: torch.device, alignment: int) -> bool:
    """Return whether a tensor is dense, of this dtype and place, and on so many bytes."""
    aligned = t.is_contiguous() and t.data_ptr() % alignment == 0
    return aligned and t.dtype == dtype and t.device == device


class Work(NamedTuple):
    """What the programs of a kernel do; all but `rows` is int64, on the device of the tensors.

    Attributes:
        rows: the rows of `tensors`, in host memory.
        tensors: a row for each parameter: the addresses of a group of tensors, the parameter's
            length, and its number where it has one.
        pieces: a row for each program: a row of `tensors`, and a piece of it.
    """

    rows: list[list[int]]
    tensors: Tensor
    pieces: Tensor


def work(
    groups: Sequence[tuple[Tensor, ...]],
    values: int,
    *,
    numbered: Sequence[int] | None = None,
    before: Work | None = None,
) -> Work:
    """Return the work on groups of tensors, a parameter before others, in pieces of so many values.

    `before` is returned if nothing has changed since: then nothing is sent to the device.
    """
    device = groups[0][0].device
    rows = [[*(dispatch.address(t) for t in group), group[0].numel()] for group in groups]
    if numbered is not None:
        rows = [[*row, number] for row, number in zip(rows, numbered, strict=True)]
    if before is not None and before.rows == rows:
        return before
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    lengths = tuple(group[0].numel() for group in groups)
    return Work(rows, dispatch.sent(table, device), _pieces(lengths, values, device))


@functools.lru_cache(maxsize=64)  # groups of parameters, or pages with a part of one
def _pieces(lengths: tuple[int, ...], values: int, device: torch.device) -> Tensor:
    counts = (torch.tensor(lengths, device="cpu") + values - 1) // values
    tensor = torch.arange(len(lengths), device="cpu").repeat_interleave(counts)
    piece = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]
    table = torch.stack([tensor, piece], dim=1)
    return dispatch.sent(table, device)


def numbers(options: AdamWOptions) -> Numbers:
    """Return the numbers of a step, in double precision."""
    step, lr, (beta1, beta2), eps, weight_decay = options
    correction = 1 / math.sqrt(1 - beta2**step)
    rate = lr / (1 - beta1**step)
    decay = 1 - lr * weight_decay
    return Numbers(decay, beta1, 1 - beta1, beta2, 1 - beta2, rate, correction, eps)


def changed(update: Update[M]) -> None:
    """Tell autograd what the kernels have written, as an operation of torch's would."""
    torch.autograd.graph.increment_version(update.params)
    for moments in (update.exp_avgs, update.exp_avg_sqs):
        parts = [p for m in moments for p in (m if isinstance(m, Moment8bit) else (m,))]
        torch.autograd.graph.increment_version(parts)
